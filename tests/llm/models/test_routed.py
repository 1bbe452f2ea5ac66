"""Answers whose workers a router chooses: what is booked, held, moved and released. In virtual time."""

from __future__ import annotations

import asyncio
import gc
import random

import pytest

from tests.llm.test_answer import CARD, GREEDY, PROMPT, Engine, Fleet, in_virtual_time, read, text_of
from tests.llm.test_worker import connect
from triton_distributed.errors import ConfigError, DeadlineExceeded, NoInstances
from triton_distributed.llm import (
    Embeddings,
    EmbedRequest,
    ModelCard,
    Models,
    Output,
    Request,
    Usage,
    packed,
    serve_model,
)
from triton_distributed.llm.engines.mock.engine import MockEngine
from triton_distributed.llm.models.answer import Answer
from triton_distributed.llm.models.prompts import Prompt, Prompts, TokenizerThreads
from triton_distributed.llm.models.routed import Routed
from triton_distributed.llm.models.served import ServedModel
from triton_distributed.llm.routing.policies.named import policy_named
from triton_distributed.llm.tokens.tokenizer import ByteTokenizer
from triton_distributed.routing.load import LoadBook
from triton_distributed.testing.network import LocalConnection

LONG = Prompt(ids=packed(range(120_000)), tokens=120_000)  # Some 7 s of prefill, as long as nothing is measured.


class RoutedFleet(Fleet):
    """Workers of one model, and its caller with a router."""

    def __init__(self, here: LocalConnection, routing="kv", card: ModelCard = CARD, stall_timeout_s=30.0) -> None:
        super().__init__(here, card)
        self.routed = Routed(here, "models", card, routing, stall_timeout_s)
        self.model = ServedModel(here, card, self.model.prompts, routed=self.routed)
        self.core = self.routed.router.core

    async def started(self, *engines: Engine) -> list[LocalConnection]:
        workers = [await self.worker(each) for each in engines]
        await read(self.answer(Request(max_tokens=1)))  # The router knows the workers now.
        for each in engines:
            each.requests.clear()
        return workers

    def idle(self) -> bool:
        return not self.core.held and not any(
            known.work.waiting or known.work.running or known.work.promised for known in self.core.workers.values()
        )


def instance(worker: LocalConnection) -> int:
    return worker.runtime.instance_id


def chosen(answer: Answer) -> int | None:
    return None if answer.decision is None else answer.decision.chosen.worker[0]


@in_virtual_time
async def test_a_prompt_goes_where_its_beginning_is_cached_and_nothing_stays_booked(here):
    fleet = RoutedFleet(here)
    first, second = (
        Engine(),
        Engine(Output(token_ids=[97]), Output(finish_reason="stop", usage=Usage(64_000, 1, 63_936))),
    )
    await fleet.started(first)
    holder = await fleet.worker(second)
    prompt = Prompt(ids=packed(range(64_000)), tokens=64_000)
    question = fleet.routed.question(Request(prompt=prompt.ids), 64_000, "")
    fleet.core.index.store((instance(holder), 0), question.keys)
    told = fleet.model.explain(prompt, Request())
    assert told is not None
    assert (told.chosen.worker[0], told.chosen.cached_tokens) == (instance(holder), 63_999)
    assert fleet.idle()
    for _ in range(3):
        answer = fleet.model.answer(prompt, Request(max_tokens=3))
        assert not fleet.idle()
        await read(answer)
        assert chosen(answer) == instance(holder)
    assert (len(first.requests), len(second.requests)) == (0, 3)
    assert {each.router for each in second.requests} == {fleet.routed.router.id}
    salted = fleet.routed.question(Request(prompt=prompt.ids, cache_salt="x"), 64_000, "")
    assert not {*salted.keys} & {*question.keys}
    counted = fleet.routed.counts
    assert counted.decisions == {("kv", "off"): 4}
    assert counted.believed.buckets()[1] == 3 * 63_999
    assert counted.measured.buckets()[1] == 3 * 63_936
    assert fleet.idle()


@in_virtual_time
async def test_a_held_request_begins_when_a_worker_has_room_and_leaves_nothing_if_it_ends_before(here):
    fleet = RoutedFleet(here)
    engine = Engine(step_s=5)
    await fleet.started(engine)
    held: list[float] = []
    begun = fleet.model.answer(LONG, Request(max_tokens=1))
    waiting = fleet.model.answer(LONG, Request(max_tokens=1))
    left = fleet.model.answer(LONG, Request(max_tokens=1))
    late = fleet.model.answer(LONG, Request(max_tokens=1), timeout=2)
    dropped = fleet.model.answer(LONG, Request(max_tokens=1))
    assert fleet.core.held == 4
    assert left.decision is None
    with pytest.raises(DeadlineExceeded):
        await read(late)
    reader = asyncio.create_task(read(left))
    await asyncio.sleep(1)
    await left.aclose()
    await asyncio.wait([reader])
    assert reader.cancelled()
    del dropped, late, left
    gc.collect()
    await read(begun)
    await asyncio.sleep(1)
    assert len(engine.requests) == 2  # It began although it is not read yet.
    held = [waiting.decision.held_s] if waiting.decision else []
    await read(waiting)
    assert held == [pytest.approx(5, abs=0.5)]
    assert fleet.routed.counts.held.buckets()[1] == pytest.approx(held[0])
    await asyncio.sleep(30)
    assert (len(engine.requests), engine.active) == (2, 0)
    assert fleet.idle()


@in_virtual_time
async def test_a_held_request_fails_when_the_model_leaves(here):
    fleet = RoutedFleet(here)
    await fleet.started(Engine(step_s=5))
    begun, held = (fleet.model.answer(LONG, Request(max_tokens=1)) for _ in range(2))
    reader = asyncio.create_task(read(held))
    await asyncio.sleep(1)
    await fleet.routed.close()
    with pytest.raises(NoInstances, match="the model 'm'"):
        await reader
    await read(begun)  # What has begun is not disturbed.
    assert fleet.idle()


@in_virtual_time
async def test_what_a_worker_refuses_or_loses_is_booked_elsewhere(here):
    worker = await here.worker()

    def preferred(question, candidates):
        return max(candidates, key=lambda each: each.worker[0] == instance(worker))

    fleet, full, other = RoutedFleet(here, preferred), Engine(), Engine()
    await fleet.started(other)
    await worker.serve(fleet.endpoint, full.generate, max_inflight=1, max_queue=0)
    answers = [fleet.answer(Request(max_tokens=3, sampling=GREEDY)) for _ in range(2)]
    assert [chosen(each) for each in answers] == [instance(worker)] * 2
    for each in answers:
        await read(each)
    assert len(full.requests) == len(other.requests) == 1
    assert chosen(answers[1]) != instance(worker)
    assert fleet.idle()
    await worker.close()
    spare = Engine()
    await fleet.worker(spare)
    request = Request(max_tokens=9, sampling=GREEDY)
    answer = fleet.answer(request)
    text = (await anext(answer)).text
    busy = {(key, known.work.running) for key, known in fleet.core.workers.items() if known.work.running}
    ((lost, _),) = {key for key, _ in busy}
    for each in here._network.connections:
        if each.runtime.instance_id == lost:
            await each.kill()
    rest, _ = await read(answer)
    assert text + rest == text_of(request)
    assert chosen(answer) != lost
    assert fleet.idle()


@in_virtual_time
async def test_a_policy_of_the_user_gets_the_session_and_a_wrong_one_is_told_at_once(here):
    asked = []

    def last(question, candidates):
        asked.append((question.session, question.tokens, len(candidates)))
        return max(candidates, key=lambda each: each.worker)

    fleet = RoutedFleet(here, last)
    engines = Engine(), Engine()
    workers = await fleet.started(*engines)
    for _ in range(3):
        await read(fleet.answer(Request(max_tokens=2), session="s"))
    assert asked[-3:] == [("s", 5, 2)] * 3
    by_id = sorted(zip(map(instance, workers), engines, strict=True))
    assert [len(each.requests) for _, each in by_id] == [0, 3]
    await read(fleet.answer(Request(max_tokens=2), policy="round_robin"))  # The call's own policy goes before.
    assert len(asked) == 4
    assert fleet.idle()
    fleet.core._policy = policy_named(lambda question, candidates: candidates[9], random.Random(), LoadBook()).choose
    with pytest.raises(ValueError, match="routing policy .* raised IndexError"):
        await read(fleet.answer(Request(max_tokens=2)))
    assert fleet.idle()
    with pytest.raises(ConfigError, match="kv_linear"):
        Models(here, routing="no such")


@in_virtual_time
async def test_a_conversation_stays_where_it_is_cached_whichever_front_end_it_comes_through(here):
    served = [await serve_model(await here.worker(), MockEngine(speed="dynamo", answer_tokens=8)) for _ in range(3)]
    card = served[0].card
    fronts = [Routed(here, "models", card, "kv") for _ in range(2)]
    prompts = Prompts(card, ByteTokenizer(), None, TokenizerThreads())
    models = [ServedModel(here, card, prompts, routed=each) for each in fronts]
    history, places, cached = [97] * 4000, set(), []
    for turn in range(6):
        await asyncio.sleep(5)
        prompt = Prompt(ids=packed(history), tokens=len(history))
        answer = models[turn % 2].answer(prompt, Request(max_tokens=8))
        _, deltas = await read(answer)
        places.add(chosen(answer))
        cached.append(deltas[-1].usage.cached_tokens if deltas[-1].usage else 0)
        history += [98 + turn] * 640
    assert len(places) == 1
    assert cached == [0] + [(4000 + 640 * turn) // 64 * 64 for turn in range(5)]
    counts = fronts[0].counts  # Of all front ends of one connection.
    assert counts.believed.buckets()[1] == counts.measured.buckets()[1] == sum(cached)
    assert counts.decisions == {("kv", "exact"): 6}
    assert {each.mode for front in fronts for each in front.states()} == {"exact"}
    for each in fronts:
        await each.close()


async def test_embeddings_go_to_the_worker_with_the_fewest_requests():
    async with connect() as one, connect() as two, connect() as here, Models(here) as models:
        embedded = [0, 0]
        for at, worker in enumerate((one, two)):
            engine = MockEngine()

            async def embed(request: EmbedRequest, at: int = at, engine: MockEngine = engine) -> Embeddings:
                embedded[at] += 1
                return await MockEngine.embed(engine, request)

            engine.embed = embed  # type: ignore[method-assign]
            await serve_model(worker, engine)
        model = await models.wait_for("mock", 10)
        await here.wait_for_instances(f"models.{model.card.component}.embed", 2, timeout=10)
        for _ in range(2):  # At first, the workers are not connected.
            embedded[:] = 0, 0
            await asyncio.gather(*(model.embed([PROMPT]) for _ in range(8)))
        assert embedded == [4, 4]
