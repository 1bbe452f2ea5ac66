"""Answers: their text, their end, their usage, and how they go on after a loss. In virtual time."""

from __future__ import annotations

import asyncio
import functools
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import pytest

from triton_distributed import Stream, Unary
from triton_distributed.errors import DeadlineExceeded, Overloaded, RemoteError, StreamIncomplete
from triton_distributed.llm import (
    AnswerLost,
    Candidate,
    Embeddings,
    EmbedRequest,
    EngineStalled,
    Guide,
    InvalidParameter,
    LLMError,
    ModelCard,
    Output,
    Request,
    Sampling,
    TokenLogprob,
    Usage,
    packed,
)
from triton_distributed.llm.models.answer import Answer
from triton_distributed.llm.models.delta import Delta
from triton_distributed.llm.models.prompts import Prompt, Prompts, TokenizerThreads
from triton_distributed.llm.models.served import ServedModel
from triton_distributed.llm.tokens.tokenizer import ByteTokenizer
from triton_distributed.testing import run_in_virtual_time
from triton_distributed.testing.network import LocalConnection, LocalNetwork

END = 256
CARD = ModelCard(name="m", tokenizer="bytes", eos_token_ids=(END,), continues="greedy")
GREEDY = Sampling(temperature=0)


PROMPT = Prompt(ids=packed(list(b"hello")), tokens=5)


class Engine:
    """Makes each token from all tokens before it, so that a lost or repeated one changes all later ones.

    Args:
        outputs: what it answers instead.
        step_s: seconds before each output.
        hangs_after: makes no progress after this many outputs.
    """

    def __init__(self, *outputs: Output, step_s: float = 0.1, hangs_after: int = -1) -> None:
        self.outputs, self.step_s, self.hangs_after = outputs, step_s, hangs_after
        self.requests: list[Request] = []
        self.active = self.sent = 0

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        self.requests.append(request)
        self.active += 1
        try:
            for at, output in enumerate(self.outputs or made(request)):
                if at == self.hangs_after:
                    await asyncio.Event().wait()
                await asyncio.sleep(self.step_s)
                self.sent += 1
                yield output
        finally:
            self.active -= 1


def made(request: Request) -> list[Output]:
    ids, found = list(request.token_ids), []
    for at in range(request.max_tokens):
        ids.append(97 + zlib.crc32(packed(ids)) % 26)
        found.append(Output(token_ids=ids[-1:], finish_reason="length" if at == request.max_tokens - 1 else None))
    return found


def text_of(request: Request) -> str:
    """The text of an undisturbed answer."""
    return "".join(chr(each.token_ids[0]) for each in made(msgspec.structs.replace(request, prompt=PROMPT.ids)))


async def read(answer: Answer) -> tuple[str, list[Delta]]:
    """Read an answer, and check that it has exactly one end."""
    found = [each async for each in answer]
    assert [each.finish_reason is not None for each in found] == [False] * (len(found) - 1) + [True]
    assert [each.usage is not None for each in found] == [False] * (len(found) - 1) + [True]
    return "".join(each.text for each in found), found


class Fleet:
    """Workers of one model, and its caller."""

    def __init__(self, here: LocalConnection, card: ModelCard = CARD, stall_timeout_s: float = 30.0) -> None:
        self.here, self.card = here, card
        prompts = Prompts(card, ByteTokenizer() if card.tokenizer else None, None, TokenizerThreads())
        self.model = ServedModel(here, card, prompts, stall_timeout_s=stall_timeout_s)
        self.endpoint = Stream[Request, Output](f"models.{card.component}.generate")

    async def worker(self, engine: Engine, **options: Any) -> LocalConnection:
        worker = await self.here.worker()
        await worker.serve(self.endpoint, engine.generate, **options)
        return worker

    def answer(self, request: Request, **options: Any) -> Answer:
        return self.model.answer(PROMPT, request, **options)


def in_virtual_time(program: Callable[[LocalConnection], Awaitable[None]]) -> Callable[[], None]:
    @functools.wraps(program)
    def test() -> None:
        async def main() -> None:
            async with LocalNetwork() as here:
                await program(here)

        run_in_virtual_time(main())

    del test.__wrapped__
    return test


@in_virtual_time
async def test_an_answer_has_its_text_its_tokens_and_its_usage(here):
    fleet = Fleet(here)
    engine = Engine(
        Output(token_ids=list("Gr\u00fc".encode())[:3]),  # A part of a character.
        Output(token_ids=list("\u00fc\u00dfe".encode())[1:]),
        Output(token_ids=[END], finish_reason="stop", usage=Usage(5, 7, 4)),
    )
    await fleet.worker(engine)
    text, deltas = await read(fleet.answer(Request(max_tokens=20)))
    assert text == "Gr\u00fc\u00dfe"
    assert [each for delta in deltas for each in delta.token_ids] == [*"Gr\u00fc\u00dfe".encode(), END]
    assert deltas[-1].usage == Usage(5, 8, 4)
    assert deltas[-1].stop_reason is None
    assert engine.requests[0].prompt == PROMPT.ids


@in_virtual_time
async def test_more_gives_what_has_arrived_and_does_not_wait(here):
    fleet = Fleet(here)
    half, rest = "é".encode()
    outputs = [Output(token_ids=[each]) for each in (97, 98, half, rest)]
    outputs.append(Output(token_ids=[99], finish_reason="length"))
    await fleet.worker(Engine(*outputs, step_s=1))
    answer = fleet.answer(Request(max_tokens=5))
    assert (await anext(answer)).text == "a"
    assert await answer.more() is None
    await asyncio.sleep(2.5)  # `b` and a half of a character have come.
    ready = [await answer.more(), await answer.more()]
    assert [each and each.text for each in ready] == ["b", None]
    await asyncio.sleep(10)
    ready = [await answer.more(), await answer.more()]
    assert [each and each.text for each in ready] == ["é", "c"]
    assert await answer.more() is None
    assert [each async for each in answer] == []


@in_virtual_time
async def test_a_stop_text_ends_the_answer_and_the_engines_work(here):
    fleet = Fleet(here)
    for size in (1, 2, 7):
        letters = b"one two STOP three four"
        engine = Engine(*[Output(token_ids=list(letters[at : at + size])) for at in range(0, len(letters), size)])
        worker = await fleet.worker(engine)
        text, deltas = await read(fleet.answer(Request(max_tokens=50, stop=["STOP", "never"])))
        assert text == "one two "
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "STOP")
        assert deltas[-1].usage == Usage(5, 12, 0)
        assert sum(len(each.token_ids) for each in deltas) == 12
        await asyncio.sleep(1)
        assert engine.active == 0
        assert engine.sent <= 12 // size + 2
        await worker.close()


@in_virtual_time
async def test_stop_tokens_and_min_tokens(here):
    fleet = Fleet(here)
    engine = Engine(*[Output(token_ids=[each]) for each in b"a.b.c"], Output(token_ids=[33], finish_reason="stop"))
    await fleet.worker(engine)
    text, deltas = await read(fleet.answer(Request(max_tokens=50, stop=["."], min_tokens=3, stop_token_ids=[33])))
    assert (text, deltas[-1].stop_reason) == ("a.b", ".")
    text, deltas = await read(fleet.answer(Request(max_tokens=50, stop_token_ids=[33])))
    assert (text, deltas[-1].stop_reason) == ("a.b.c", 33)


@in_virtual_time
async def test_log_probabilities_have_texts_and_bytes(here):
    fleet = Fleet(here)
    top = [Candidate(98, -0.5), Candidate(0xC3, -1.5), Candidate(-1, -2.0, "zz")]
    engine = Engine(
        Output(token_ids=[98], logprobs=[TokenLogprob(98, -0.5, top=top)]),
        Output(token_ids=[END], logprobs=[TokenLogprob(END, -0.1)], finish_reason="stop"),
    )
    await fleet.worker(engine)
    _, deltas = await read(fleet.answer(Request(max_tokens=9, sampling=Sampling(logprobs=3))))
    (found,) = [each for delta in deltas for each in delta.logprobs or ()]
    assert (found.text, found.bytes, found.logprob) == ("b", b"b", -0.5)
    assert [(each.text, each.bytes) for each in found.top] == [("b", b"b"), ("\ufffd", b"\xc3"), ("zz", b"zz")]


@in_virtual_time
async def test_an_answer_goes_on_at_other_workers_after_kills(here):
    fleet = Fleet(here)
    request = Request(max_tokens=30, min_tokens=4, sampling=GREEDY, stop=["no such text"])
    engines = {await fleet.worker(engine): engine for engine in (Engine(), Engine(), Engine())}
    answer, text, deltas = fleet.answer(request), "", []
    async for delta in answer:
        text += delta.text
        deltas.append(delta)
        if len(text) in (7, 17):
            for worker, engine in engines.items():
                if engine.active:
                    await worker.kill()
    assert text == text_of(request)
    assert answer.losses == 2
    assert deltas[-1].usage == Usage(5, 30, 0)
    assert deltas[-1].finish_reason == "length"
    asked = sorted((each for engine in engines.values() for each in engine.requests), key=lambda each: each.continued)
    assert [each.continued > 0 for each in asked] == [False, True, True]
    assert all(each.max_tokens + each.continued == 30 for each in asked)
    assert all(len(each.prompt) == 4 * (5 + each.continued) for each in asked)
    assert [each.min_tokens for each in asked] == [4, 0, 0]


@in_virtual_time
async def test_an_answer_goes_on_when_its_worker_is_shut_down(here):
    fleet = Fleet(here)
    request = Request(max_tokens=9, sampling=GREEDY)
    first, second = Engine(), Engine()
    worker = await fleet.worker(first, graceful_shutdown=False)
    answer = fleet.answer(request)
    text = (await anext(answer)).text
    await fleet.worker(second)
    await worker.close()
    rest, _ = await read(answer)
    assert text + rest == text_of(request)
    assert second.requests


@in_virtual_time
async def test_what_cannot_go_on_says_why(here):
    fleet = Fleet(here)
    await fleet.worker(Engine())
    for request, why in (
        (Request(max_tokens=9), "by chance"),
        (Request(max_tokens=9, sampling=GREEDY, guide=Guide(json=True)), "guide"),
    ):
        spare = Engine()
        worker = await fleet.worker(Engine())
        answer = fleet.answer(request, policy=only(worker))
        await anext(answer)
        await fleet.worker(spare)
        await worker.kill()
        with pytest.raises(AnswerLost, match=f"after 1 tokens of the answer: .*{why}") as caught:
            await read(answer)
        assert caught.value.tokens == 1
        assert [each async for each in answer] == []  # It is over, and has no second end.
        assert not spare.requests


def only(worker: LocalConnection) -> Callable[..., Any]:
    """A policy that chooses one worker while it is there."""
    return lambda request, instances, load: next(
        (each for each in instances if each.id == worker.runtime.instance_id), instances[0]
    )


@in_virtual_time
async def test_a_request_of_which_nothing_was_seen_is_sent_again(here):
    fleet = Fleet(here)
    first, second = Engine(step_s=9), Engine()
    worker = await fleet.worker(first)
    await fleet.worker(second)
    request = Request(max_tokens=9, guide=Guide(json=True))
    answer = fleet.answer(request, policy=only(worker))
    reading = asyncio.create_task(read(answer))
    await asyncio.sleep(1)
    await worker.kill()
    text, _ = await reading
    assert text == text_of(request)
    assert second.requests[0].continued == 0


@in_virtual_time
async def test_a_request_that_kills_its_workers_does_not_get_the_whole_fleet(here):
    fleet = Fleet(here)
    killed: list[LocalConnection] = []

    async def generate(request: Request) -> AsyncIterator[Output]:
        worker = workers[len(killed)]
        killed.append(worker)
        task = asyncio.create_task(worker.kill())
        await asyncio.Event().wait()
        yield Output(text=str(task))

    workers = [await here.worker() for _ in range(12)]
    for each in workers:
        await each.serve(fleet.endpoint, generate)
    order = iter(workers)
    with pytest.raises(StreamIncomplete):
        await read(fleet.answer(Request(), policy=lambda request, instances, load: only(next(order))(0, instances, 0)))
    assert 2 <= len(killed) < 9


@in_virtual_time
async def test_a_complete_answer_whose_end_was_lost_needs_no_other_worker(here):
    fleet = Fleet(here)
    for request, ids, reason in (
        (Request(max_tokens=2), b"ab", "length"),
        (Request(max_tokens=9), [*b"ab", END], "stop"),
    ):
        worker = await fleet.worker(Engine(Output(token_ids=list(ids)), Output(), hangs_after=1))
        answer = fleet.answer(request)
        text = (await anext(answer)).text
        await worker.kill()
        rest, deltas = await read(answer)
        assert (text + rest, deltas[-1].finish_reason) == ("ab", reason)
        assert deltas[-1].usage == Usage(5, len(ids), 0)


@in_virtual_time
async def test_cached_tokens_are_those_of_the_first_worker_that_answered(here):
    fleet = Fleet(here)
    told, silent = Output(token_ids=[97], usage=Usage(5, 1, 3)), Output(token_ids=[97])
    for first, cached in ((told, 3), (silent, 0), (None, 4)):
        lost = await fleet.worker(Engine(*([first] if first else []), Output(), hangs_after=1 if first else 0))
        last = Output(token_ids=[98], finish_reason="length", usage=Usage(6, 1, 4))
        answer = fleet.answer(Request(max_tokens=2, sampling=GREEDY), policy=only(lost))
        text = (await anext(answer)).text if first else ""
        other = await fleet.worker(Engine(last))
        reading = asyncio.create_task(read(answer))
        await asyncio.sleep(0.05)
        await lost.kill()
        rest, deltas = await reading
        assert (text + rest)[-1] == "b"
        assert deltas[-1].usage == Usage(5, 2 if first else 1, cached)
        await other.close()


@in_virtual_time
async def test_a_stalled_worker_is_left_for_another_one(here):
    fleet = Fleet(here, stall_timeout_s=5)
    request = Request(max_tokens=9, sampling=GREEDY)
    for at, least in ((3, 5), (0, 20)):  # The first output may take four times as long.
        first, second = Engine(hangs_after=at), Engine()
        worker = await fleet.worker(first)
        other = await fleet.worker(second)
        began = asyncio.get_running_loop().time()
        answer = fleet.answer(request, policy=only(worker))
        text, deltas = await read(answer)
        took = asyncio.get_running_loop().time() - began
        assert text == text_of(request)
        assert deltas[-1].usage == Usage(5, 9, 0)
        assert least < took < least + 2
        assert first.active == 0
        assert answer.losses == 1
        await worker.close()
        await other.close()


@in_virtual_time
async def test_without_another_worker_a_stall_is_an_error(here):
    fleet = Fleet(here, stall_timeout_s=5)
    engine = Engine(hangs_after=2)
    await fleet.worker(engine)
    for request in (Request(max_tokens=9, sampling=GREEDY), Request(max_tokens=9)):
        with pytest.raises(EngineStalled, match="no progress for 5 s"):
            await read(fleet.answer(request))
        await asyncio.sleep(0.1)
        assert engine.active == 0


@in_virtual_time
async def test_waiting_in_a_queue_and_slow_readers_are_no_stall(here):
    fleet = Fleet(here, stall_timeout_s=5)
    engine = Engine(step_s=3)
    await fleet.worker(engine, max_inflight=1, max_queue=1)
    request = Request(max_tokens=20, sampling=GREEDY)
    first = asyncio.create_task(read(fleet.answer(request)))
    await asyncio.sleep(0.1)
    second = fleet.answer(request)  # It waits a minute for the first one.
    assert (await first)[0] == text_of(request)
    text = (await anext(second)).text
    await asyncio.sleep(100)
    assert text + (await read(second))[0] == text_of(request)
    assert len(engine.requests) == 2


@in_virtual_time
async def test_leaving_cancels_the_engine_in_every_phase(here):
    fleet = Fleet(here)
    engine = Engine(step_s=1)
    await fleet.worker(engine, max_inflight=1, max_queue=4)
    request = Request(max_tokens=50)

    async def leave(answer: Answer, how: str) -> None:
        if how == "aclose":
            await answer.aclose()
        elif how == "while it is read":
            reading = asyncio.create_task(read(answer))
            await asyncio.sleep(0.1)
            await answer.aclose()
            with pytest.raises(asyncio.CancelledError):
                await reading
        else:
            reading = asyncio.create_task(read(answer))
            await asyncio.sleep(0.1)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading

    for how in ("aclose", "while it is read", "cancelled"):
        for seconds in (0, 0.5, 2.5):  # On its way, before the first output, in the middle.
            answer = fleet.answer(request)
            await asyncio.sleep(seconds)
            await leave(answer, how)
            await asyncio.sleep(0.01)
            assert engine.active == 0
            assert [each async for each in answer] == []
        running = fleet.answer(request)
        await anext(running)
        asked = len(engine.requests)
        await leave(fleet.answer(request), how)  # In the queue.
        await running.aclose()
        await asyncio.sleep(1)
        assert (engine.active, len(engine.requests)) == (0, asked)
    dropped = fleet.answer(request)
    await anext(dropped)
    del dropped
    await asyncio.sleep(0.01)
    assert engine.active == 0


@in_virtual_time
async def test_an_engine_that_makes_text_itself(here):
    fleet = Fleet(here, ModelCard(name="m", continues="always"))
    call = [{"index": 0, "id": "c", "function": {"name": "f", "arguments": ""}}]
    engine = Engine(
        Output(reasoning="hm"),
        Output(text="ab"),
        Output(text="c<EN"),
        Output(text="x", tool_calls=call),
        Output(text="<E"),
        Output(text="ND>d", finish_reason="length", usage=Usage(3, 9, 1)),
    )
    worker = await fleet.worker(engine)
    messages = [{"role": "user", "content": "hi"}]
    prompt = Prompt(messages=messages, tokens=0)
    text, deltas = await read(fleet.model.answer(prompt, Request(stop=["<END>"])))
    assert text == "abc<ENx"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "<END>")
    assert deltas[-1].usage == Usage(3, 9, 1)
    assert "".join(each.reasoning or "" for each in deltas) == "hm"
    assert [each.tool_calls for each in deltas if each.tool_calls] == [call]
    assert (engine.requests[0].messages, engine.requests[0].prompt) == (messages, b"")
    for wrong in ({"n": 2**70}, {"n": "\ud800"}):
        with pytest.raises(InvalidParameter, match=r"^messages\[0\]\.n: .* cannot travel"):
            await read(fleet.model.answer(Prompt(messages=[wrong], tokens=0), Request()))
    answer = fleet.model.answer(prompt, Request(sampling=GREEDY))
    await anext(answer)
    await worker.kill()
    with pytest.raises(AnswerLost, match="makes the text itself"):
        await read(answer)


@in_virtual_time
async def test_a_refused_request_raises_and_a_refused_rest_waits(here):
    fleet = Fleet(here)
    request = Request(max_tokens=20, sampling=GREEDY)
    first, second = Engine(), Engine(step_s=1)
    worker = await fleet.worker(first)
    answer = fleet.answer(request)
    text = (await anext(answer)).text
    other = await fleet.worker(second, max_inflight=1)
    busy = fleet.answer(Request(max_tokens=4), policy=only(other))
    await anext(busy)
    await worker.kill()
    with pytest.raises(Overloaded):
        await read(fleet.answer(request))
    reading = asyncio.create_task(read(answer))
    await read(busy)
    assert text + (await reading)[0] == text_of(request)


@in_virtual_time
async def test_a_rest_that_no_worker_takes_is_lost(here):
    fleet = Fleet(here, stall_timeout_s=5)
    first, second = Engine(), Engine(step_s=100)
    worker = await fleet.worker(first)
    answer = fleet.answer(Request(max_tokens=20, sampling=GREEDY))
    await anext(answer)
    other = await fleet.worker(second, max_inflight=1)
    busy = fleet.answer(Request(), policy=only(other))
    await asyncio.sleep(0.1)
    await worker.kill()
    with pytest.raises(AnswerLost, match="no other worker takes the rest: they are at capacity$"):
        await read(answer)
    await busy.aclose()


@in_virtual_time
async def test_the_rest_waits_a_while_for_a_worker_to_come_back(here):
    fleet = Fleet(here)
    request = Request(max_tokens=20, sampling=GREEDY)
    for comes_back in (True, False):
        began = asyncio.get_running_loop().time()
        worker = await fleet.worker(Engine())
        answer = fleet.answer(request)
        text = (await anext(answer)).text
        await worker.kill()
        reading = asyncio.create_task(read(answer))
        if comes_back:
            await asyncio.sleep(15)
            worker = await fleet.worker(Engine())
            assert text + (await reading)[0] == text_of(request)
            await worker.close()
        else:
            with pytest.raises(AnswerLost, match="no other worker takes the rest"):
                await reading
            assert 30 <= asyncio.get_running_loop().time() - began < 45


@in_virtual_time
async def test_the_timeout_is_for_the_whole_answer(here):
    fleet = Fleet(here)
    began = asyncio.get_running_loop().time()
    worker = await fleet.worker(Engine(step_s=1))
    answer = fleet.answer(Request(max_tokens=50, sampling=GREEDY), timeout=10)
    for _ in range(4):
        await anext(answer)
    await fleet.worker(Engine(step_s=1))
    await worker.kill()
    with pytest.raises(DeadlineExceeded):
        await read(answer)
    assert 9.9 < asyncio.get_running_loop().time() - began < 10.1


@in_virtual_time
async def test_an_engine_that_breaks_its_contract_or_fails(here):
    fleet = Fleet(here)

    async def fails(request: Request) -> AsyncIterator[Output]:
        yield Output(token_ids=[97])
        raise ValueError("out of memory")

    for engine, error, word in (
        (Engine(Output(token_ids=[97])).generate, LLMError, "without a reason"),
        (Engine(Output(token_ids=[-1])).generate, LLMError, "invalid token id"),
        (fails, RemoteError, "out of memory"),
    ):
        worker = await here.worker()
        await worker.serve(fleet.endpoint, engine)
        with pytest.raises(error, match=word):
            await read(fleet.answer(Request()))
        await worker.close()

    text_only = Fleet(here, ModelCard(name="t"))
    await text_only.worker(Engine(Output(token_ids=[97])))
    with pytest.raises(LLMError, match="no tokenizer"):
        await read(text_only.answer(Request()))
    with pytest.raises(TypeError, match="resume"):
        fleet.answer(Request(), resume=True)


@in_virtual_time
async def test_embeddings(here):
    fleet = Fleet(here)
    seen: list[EmbedRequest] = []
    vectors = [b"\0\0\0\0" * 3, b"\0\0\x80\x3f" * 3]

    async def embed(request: EmbedRequest) -> Embeddings:
        seen.append(request)
        return Embeddings(vectors, 0)

    worker = await here.worker()
    await worker.serve(Unary[EmbedRequest, Embeddings](f"models.{CARD.component}.embed"), embed)
    found = await fleet.model.embed([PROMPT, PROMPT], dimensions=3)
    assert (found.vectors, found.prompt_tokens) == (vectors, 10)
    assert (seen[0].prompts, seen[0].dimensions, seen[0].model) == ([PROMPT.ids] * 2, 3, "m")
    vectors.pop()
    with pytest.raises(LLMError, match="2 inputs with 1 vectors"):
        await fleet.model.embed([PROMPT, PROMPT])
