"""Prompts that prefill workers compute, and answers that decode workers go on with. In virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from tests.llm.models.test_routed import LONG, RoutedFleet, instance
from tests.llm.test_answer import CARD, GREEDY, PROMPT, Engine, in_virtual_time, made, read
from triton_distributed import Stream
from triton_distributed.errors import NoInstances, RemoteError
from triton_distributed.llm import AnswerLost, ModelCard, Output, Request, Usage, packed
from triton_distributed.llm.contract.records import PREFILL, metadata_of
from triton_distributed.llm.models import prefills
from triton_distributed.llm.models.answer import Answer
from triton_distributed.llm.models.prompts import Prompt
from triton_distributed.llm.routing.split import taker
from triton_distributed.llm.routing.view import Candidate, Question
from triton_distributed.testing.network import LocalConnection

ONLY = msgspec.structs.replace(CARD, decode_only=True)
BLOCKS = {"at": "the prefill worker"}
ASKED = Request(max_tokens=4, sampling=GREEDY)
TEXT = "".join(chr(each.token_ids[0]) for each in made(Request(prompt=LONG.ids, max_tokens=4)))


def computed() -> list[Output]:
    """As vLLM answers: with the last output."""
    return [Output(token_ids=[7], finish_reason="length", usage=Usage(120_000, 1, 640), kv_transfer=BLOCKS)]


def early() -> list[Output]:
    """As SGLang answers: before it computes."""
    return [Output(kv_transfer=BLOCKS), Output(token_ids=[7], finish_reason="length", usage=Usage(120_000, 1, 640))]


class Failing(Engine):
    """Fails `failures` times; a decode worker only if it has to fetch blocks."""

    failures, prefills = 0, False

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        if self.failures and (self.prefills or request.kv_transfer is not None):
            self.failures -= 1
            self.requests.append(request)
            raise RuntimeError("the blocks are gone")
        async for output in Engine.generate(self, request):
            yield output


class Pools(RoutedFleet):
    """A decode worker that generates already, so that long prompts are computed elsewhere, and a prefill worker."""

    def __init__(self, here: LocalConnection, card: ModelCard = CARD, stall_timeout_s: float = 30) -> None:
        super().__init__(here, card=card, stall_timeout_s=stall_timeout_s)
        self.decoder = Failing()
        self.prefills = self.routed.prefills

    async def begin(self, prefiller: Engine, decode: dict[str, Any] | None = None, **options: Any) -> LocalConnection:
        metadata = metadata_of(msgspec.structs.replace(self.card, role="decode"))
        self.decode = await self.worker(self.decoder, metadata=metadata, **decode or {})
        worker = await self.here.worker()
        endpoint = Stream[Request, Output](f"models.{self.card.component}.{PREFILL}")
        await worker.serve(endpoint, prefiller.generate, **options)
        self.other = self.answer(Request(max_tokens=1000))
        await anext(self.other)
        self.decoder.requests.clear()
        return worker

    def long(self) -> Answer:
        return self.model.answer(LONG, ASKED)

    async def check(self) -> None:
        """Nothing of the long requests is left."""
        await self.other.aclose()
        await asyncio.sleep(1)
        assert self.idle()
        core = self.prefills.router.core
        assert not any(each.work.waiting or each.work.running for each in core.workers.values())
        assert self.decoder.active == 0
        assert not self.prefills._running
        assert not [each for each in asyncio.all_tasks() if each.get_name() == "trd-prefill"]


@pytest.mark.parametrize("outputs", [computed, early])
def test_a_prefill_worker_computes_a_long_prompt_and_a_decode_worker_goes_on(outputs):
    @in_virtual_time
    async def program(here):
        fleet, prefiller = Pools(here), Engine(*outputs(), step_s=3)
        worker = await fleet.begin(prefiller)
        fleet.decoder.step_s = 4  # It waits for the blocks.
        answer = fleet.long()
        told = fleet.model.explain(LONG, ASKED)
        assert told is not None
        assert told.prefill is not None
        assert told.prefill.worker[0] == instance(worker)
        text, deltas = await read(answer)
        assert text == TEXT
        assert deltas[-1].usage == Usage(120_000, 4, 640), "cached is what no worker had to compute"
        (asked,), (went_on,) = prefiller.requests, fleet.decoder.requests
        assert (asked.prompt, asked.max_tokens, asked.ignore_eos) == (LONG.ids, 1, True)
        assert went_on.kv_transfer == BLOCKS
        assert (went_on.prompt, went_on.max_tokens) == (LONG.ids, 4)
        decision = answer.decision
        assert decision is not None
        assert decision.prefill is not None
        assert (decision.chosen.worker[0], decision.prefill.worker[0]) == (instance(fleet.decode), instance(worker))
        assert fleet.prefills.results == {"handed_over": 1, "failed": 0}
        assert (fleet.prefills.transfer.measured, fleet.routed.counts.held.buckets()[1]) == (1, 0)
        await fleet.check()

    program()


FAULTS: dict[str, tuple[Engine, dict[str, Any]]] = {
    "full": (Engine(*computed()), {"max_inflight": 1, "max_queue": 0}),
    "fails": (Failing(), {}),
    "says nothing": (Engine(Output(finish_reason="length"), step_s=1), {}),
    "hangs": (Engine(*computed(), hangs_after=0), {}),
    "is lost": (Engine(*computed(), step_s=5), {}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_without_a_prefill_worker_that_can_the_prompt_is_computed_where_the_answer_is(fault):
    @in_virtual_time
    async def program(here):
        fleet = Pools(here, stall_timeout_s=5)
        prefiller, options = FAULTS[fault]
        worker = await fleet.begin(prefiller, **options)
        if isinstance(prefiller, Failing):
            prefiller.failures, prefiller.prefills = 1, True
        if fault == "full":
            endpoint = Stream[Request, Output](f"models.{CARD.component}.{PREFILL}")
            stream = here.stream(endpoint, Request(prompt=PROMPT.ids))
            await stream.accepted()
        if fault == "fails":
            prefiller.outputs = (Output(token_ids=[-1]),)  # Which cannot be sent.
        reader = asyncio.create_task(read(fleet.long()))
        await asyncio.sleep(0.5)
        if fault == "is lost":
            assert prefiller.active == 1
            await worker.kill()
        begun_s = asyncio.get_running_loop().time()
        text, deltas = await reader
        if fault == "hangs":
            assert 18 < asyncio.get_running_loop().time() - begun_s < 22, "four times the timeout of a stall"
        assert text == TEXT
        assert deltas[-1].usage == Usage(120_000, 4, 0)
        assert [each.kv_transfer for each in fleet.decoder.requests] == [None]
        assert fleet.prefills.results == {"handed_over": 0, "failed": 1}
        await fleet.check()

    program()


@in_virtual_time
async def test_a_request_that_cannot_get_its_blocks_begins_again_without_them(here):
    fleet = Pools(here)
    await fleet.begin(Engine(*computed()))
    fleet.decoder.failures = 1
    text, deltas = await read(fleet.long())
    assert text == TEXT
    assert deltas[-1].usage == Usage(120_000, 4, 0)
    assert [each.kv_transfer for each in fleet.decoder.requests] == [BLOCKS, None]
    await fleet.check()


class Plain(Engine):
    """A worker that generates and cannot fetch blocks: `serve_model` takes the place of the blocks away."""

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        request.kv_transfer = None
        async for output in Engine.generate(self, request):
            yield output


@pytest.mark.parametrize("taken", [True, False])
def test_a_prompt_whose_decode_worker_refuses_it_goes_to_another_one_or_is_computed_again(taken):
    @in_virtual_time
    async def program(here):
        fleet, full, plain = Pools(here), Failing(hangs_after=0), Plain(step_s=7)
        await fleet.begin(Engine(*computed(), step_s=3), {} if taken else {"max_inflight": 1, "max_queue": 0})
        answer = fleet.long()
        await asyncio.sleep(1)
        await fleet.worker(plain, metadata=metadata_of(CARD))
        if taken:  # The router prefers another one, which refuses.
            metadata = metadata_of(msgspec.structs.replace(CARD, role="decode"))
            worker = await fleet.worker(full, metadata=metadata, max_inflight=1, max_queue=0)
            await asyncio.sleep(0.1)

            def there(request: Any, instances: Any, load: Any) -> Any:
                return next(each for each in instances if each.id == instance(worker))

            stream = here.stream(fleet.endpoint, Request(prompt=PROMPT.ids), policy=there)
            await stream.accepted()
        text, deltas = await read(answer)
        assert text == TEXT
        assert deltas[-1].usage == Usage(120_000, 4, 640 if taken else 0)
        assert fleet.prefills.results == {"handed_over": int(taken), "failed": int(not taken)}
        assert fleet.prefills.transfer.measured == int(taken)
        assert [each.kv_transfer for each in fleet.decoder.requests] == [BLOCKS] * taken
        assert len(plain.requests) == int(not taken)
        if taken:
            stream.cancel()
        await fleet.check()

    program()


@in_virtual_time
async def test_an_answer_whose_decode_worker_is_lost_goes_on_by_replay(here):
    fleet, prefiller = Pools(here), Engine(*computed())
    await fleet.begin(prefiller)
    answer = fleet.long()
    text = (await anext(answer)).text
    spare = Engine()
    await fleet.worker(spare)
    await fleet.decode.kill()
    rest, deltas = await read(answer)
    assert text + rest == TEXT
    assert deltas[-1].usage == Usage(120_000, 4, 640)
    assert ([each.kv_transfer for each in spare.requests], len(prefiller.requests)) == ([None], 1)
    fleet.decoder.active = 0
    await fleet.check()


@in_virtual_time
async def test_a_caller_that_leaves_frees_both_workers_at_each_stage(here):
    fleet, prefiller = Pools(here), Engine(*computed(), step_s=3)
    await fleet.begin(prefiller)
    prefiller.outputs = (*prefiller.outputs, Output())  # It keeps the stream until the blocks have been fetched.
    prefiller.outputs[0].finish_reason = None
    fleet.decoder.step_s = 3
    for seconds, at_prefill, at_decode in ((0.0, 0, 1), (1.0, 1, 1), (4.0, 1, 2), (6.5, 0, 2)):
        for leave in ("close", "drop"):
            answer = fleet.long()
            await asyncio.sleep(seconds)
            if seconds:
                assert (prefiller.active, fleet.decoder.active) == (at_prefill, at_decode), (seconds, leave)
            if leave == "close":
                await answer.aclose()
            del answer
            gc.collect()
            await asyncio.sleep(0.5)
            assert (prefiller.active, fleet.decoder.active) == (0, 1), (seconds, leave)
    await fleet.check()


@in_virtual_time
async def test_prompts_wait_for_a_prefill_worker_with_room_and_fail_when_the_model_leaves(here):
    fleet, prefiller = Pools(here), Engine(*computed(), step_s=3)
    await fleet.begin(prefiller)
    fleet.decoder.step_s = 100
    answers = [fleet.long() for _ in range(3)]
    elsewhere = [each for each in answers if each.decision is None]
    assert elsewhere, "some go to the decode worker: it would take as long to wait"
    await asyncio.sleep(1)
    assert prefiller.active == 1
    readers = [asyncio.create_task(read(each)) for each in elsewhere]
    await asyncio.sleep(1)
    await fleet.routed.close()
    for each in readers:
        with pytest.raises(NoInstances):
            await each
    for answer in answers:
        await answer.aclose()
    await fleet.check()


@in_virtual_time
async def test_workers_that_compute_no_prompts_get_all_of_them_from_prefill_workers(here):
    fleet, prefiller = Pools(here, ONLY), Failing(*early(), step_s=0.05)
    prefiller.prefills = True
    worker = await fleet.begin(prefiller)
    await read(fleet.answer(Request(max_tokens=2)))
    told = fleet.model.explain(PROMPT, Request())
    assert told is not None
    assert told.prefill is not None, "short prompts, too"
    prefiller.failures = 1
    with pytest.raises(RemoteError, match="the blocks are gone"):
        await read(fleet.answer(Request(max_tokens=2)))
    fleet.decoder.failures = 1
    with pytest.raises(RemoteError, match="the blocks are gone"):
        await read(fleet.answer(Request(max_tokens=2)))
    assert [each.kv_transfer for each in fleet.decoder.requests] == [BLOCKS] * 2
    answer = fleet.answer(Request(max_tokens=9, sampling=GREEDY))
    await anext(answer)
    spare = Engine()
    await fleet.worker(spare)
    await fleet.decode.kill()
    with pytest.raises(AnswerLost, match="no other worker can compute its prompt"):
        await read(answer)
    await worker.close()
    with pytest.raises(NoInstances):
        await read(fleet.answer(Request(max_tokens=2)))
    assert spare.requests == []
    fleet.decoder.active = 0
    await fleet.check()


@in_virtual_time
async def test_every_text_is_exact_and_nothing_is_left_whatever_fails(here):
    """Workers of both pools are killed and closed, fail and refuse, and callers leave, at random."""
    rng = random.Random(7)
    fleet = RoutedFleet(here)
    pools: dict[str, list[tuple[LocalConnection, Failing]]] = {"prefill": [], "decode": []}

    async def add(role: str) -> None:
        worker, engine = await here.worker(), Failing(step_s=rng.choice([0.05, 0.2]))
        engine.failures, engine.prefills = rng.randrange(3), role == "prefill"
        if role == "prefill":
            engine.outputs, engine.step_s = tuple(rng.choice([computed, early])()), rng.choice([0.2, 1, 3])
        endpoint = Stream[Request, Output](f"models.{CARD.component}.{PREFILL if role == 'prefill' else 'generate'}")
        metadata = metadata_of(msgspec.structs.replace(CARD, role=role))
        await worker.serve(endpoint, engine.generate, metadata=metadata, max_inflight=8, max_queue=rng.choice([0, 4]))
        pools[role].append((worker, engine))

    async def ask(number: int) -> None:
        tokens = rng.choice([5, 1500, 3000])
        request = Request(
            prompt=packed([(7 * number + at) % 200 for at in range(tokens)]), max_tokens=rng.randrange(1, 9)
        )
        expected = "".join(chr(each.token_ids[0]) for each in made(request))
        answer = fleet.model.answer(
            Prompt(ids=request.prompt, tokens=tokens), msgspec.structs.replace(request, sampling=GREEDY)
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.choice([0.5, 2, 5, None, None, None])):
                text, deltas = await read(answer)
                assert text == expected
                assert deltas[-1].usage is not None
                assert (deltas[-1].usage.prompt_tokens, deltas[-1].usage.completion_tokens) == (
                    tokens,
                    request.max_tokens,
                )

    def long_ones(
        question: Question, here: Any, there: Any, takers: Any, transfer: Any, held_s: Any
    ) -> Candidate | None:
        return taker(question, takers, transfer) if question.tokens > 5 else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefills, "split", long_ones)
        for role in ("prefill", "decode") * 3:
            await add(role)
        await read(fleet.answer(Request(max_tokens=1)))
        asking = []
        for number in range(60):
            asking.append(asyncio.create_task(ask(number)))
            await asyncio.sleep(rng.random() * 0.4)
            role = rng.choice(["prefill", "prefill", "decode"])
            if rng.random() < 0.15:
                worker, _ = pools[role].pop(0)
                await (worker.kill() if rng.random() < 0.5 else worker.close())
                await add(role)
        await asyncio.gather(*asking)
    await asyncio.sleep(2)
    results = fleet.routed.prefills.results
    assert min(results.values()) > 0, results
    assert fleet.idle()
    core = fleet.routed.prefills.router.core
    assert not core.held
    assert not any(each.work.waiting or each.work.running for each in core.workers.values())
    assert not fleet.routed.prefills._running
    assert not [each for each in asyncio.all_tasks() if each.get_name() == "trd-prefill"]
    assert not any(engine.active for pool in pools.values() for _, engine in pool)
