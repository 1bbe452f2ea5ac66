"""Batched handlers at an endpoint: types, threads, callers that leave, deadlines, the drain."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

import triton_distributed as trd
from tests.runtime.cluster import Cluster, patiently, until
from tests.timing import MS, PATIENCE_S

pytestmark = pytest.mark.any_loop

LONG_S = PATIENCE_S  # A delay that only a full batch ends.


@dataclass
class Question:
    text: str


@dataclass
class Answer:
    text: str


of_endpoint: contextvars.ContextVar[str] = contextvars.ContextVar("of_endpoint", default="none")
of_request: contextvars.ContextVar[str] = contextvars.ContextVar("of_request", default="none")

ANSWER = trd.Unary[Question, Answer]("t.c.e")


@contextlib.asynccontextmanager
async def served(handler: Any, **options: Any) -> AsyncIterator[tuple[trd.Connection, trd.Connection]]:
    """Connections of a worker that serves `handler` as ANSWER, and of a caller."""
    cluster = Cluster()
    try:
        worker = trd.connect(runtime=cluster.runtime())
        await worker.serve(ANSWER, handler, **options)
        yield worker, trd.connect(runtime=cluster.caller)
    finally:
        await cluster.close()


async def each(*calls: Any) -> list[Any]:
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.gather(*calls, return_exceptions=True)


async def test_callers_of_one_batch_get_typed_answers():
    @trd.batched(max_size=4, max_wait_s=LONG_S)
    def answer(requests: list[Question]) -> list[Answer]:
        threads.append(threading.current_thread().name)
        return [Answer(f"{request.text} of {len(requests)}") for request in requests]

    threads: list[str] = []
    async with served(answer) as (_, here):
        answers = await each(*(here.call(ANSWER, Question(str(number))) for number in range(4)))
    assert answers == [Answer(f"{number} of 4") for number in range(4)]
    assert [name.startswith("trd-handler") for name in threads] == [True]  # The worker's threads, within TRD_THREADS.


async def test_an_invalid_request_fails_alone_and_is_not_in_a_batch():
    @trd.batched(max_size=2, max_wait_s=LONG_S)
    async def answer(requests: list[Question]) -> list[Answer]:
        return [Answer(str(len(requests))) for _ in requests]

    async with served(answer) as (_, here):
        calls = (here.call("t.c.e", request) for request in ({"text": "a"}, {"text": 3}, {"text": "b"}))
        answers = await each(*calls)
    assert isinstance(answers[1], trd.InvalidRequest)
    assert [answers[0], answers[2]] == [{"text": "2"}, {"text": "2"}]


async def test_the_annotations_of_the_list_check_requests_without_a_contract():
    cluster = Cluster()

    @trd.batched(max_wait_s=0)
    async def answer(requests: list[Question]) -> list[Answer]:
        assert all(isinstance(request, Question) for request in requests)
        return [Answer(request.text) if request.text else 7 for request in requests]  # type: ignore[misc]

    client = await cluster.connect(answer)
    good, invalid, wrong = await each(
        client.call({"text": "a"}), client.call({"texts": "a"}), client.call({"text": ""})
    )
    assert good == {"text": "a"}
    assert isinstance(invalid, trd.InvalidRequest)
    assert isinstance(wrong, TypeError)  # Its answer does not fit; the other answers of the batch are good.
    await cluster.close()


async def test_errors_arrive_with_their_types():
    @trd.batched(max_size=3, max_wait_s=LONG_S)
    async def answer(requests: list[Question]) -> list[Answer | Exception]:
        if requests[0].text == "all":
            raise KeyError("all of them")
        return [LookupError("this one") if request.text == "bad" else Answer(request.text) for request in requests]

    async with served(answer) as (_, here):
        first = await each(*(here.call(ANSWER, Question(text)) for text in ("a", "bad", "c")))
        second = await each(*(here.call(ANSWER, Question("all")) for _ in range(3)))
    assert [first[0], first[2]] == [Answer("a"), Answer("c")]
    assert isinstance(first[1], LookupError)
    assert all(isinstance(error, KeyError) and isinstance(error, trd.RemoteError) for error in second)


async def test_a_method_batches_for_its_object():
    class Service:
        def __init__(self, word: str) -> None:
            self.word = word

        @trd.batched(max_size=2, max_wait_s=LONG_S)
        def answer(self, requests: list[Question]) -> list[Answer]:
            return [Answer(f"{self.word} {request.text}") for request in requests]

    async with served(Service("hello").answer) as (_, here):
        answers = await each(here.call(ANSWER, Question("a")), here.call(ANSWER, Question("b")))
    assert answers == [Answer("hello a"), Answer("hello b")]


async def test_two_workers_of_one_process_have_batches_of_their_own():
    @trd.batched(max_size=2, max_wait_s=LONG_S)
    async def answer(requests: list[Question]) -> list[Answer]:
        return [Answer(str(len(requests))) for _ in requests]

    cluster = Cluster()
    for _ in range(2):
        await trd.connect(runtime=cluster.runtime()).serve(ANSWER, answer)
    here = trd.connect(runtime=cluster.caller)
    await patiently(here.wait_for_instances(ANSWER, 2))
    answers = await each(*(here.call(ANSWER, Question("a"), policy="round_robin") for _ in range(4)))
    assert answers == [Answer("2")] * 4
    assert answer.statistics().batches == 2
    await cluster.close()


async def test_a_call_in_a_batch_uses_the_connection_of_the_worker_and_no_callers_deadline():
    @trd.batched(max_size=2, max_wait_s=LONG_S)
    async def answer(requests: list[Question]) -> list[Answer]:
        context = trd.current_context()
        assert context is not None
        remaining.append(context.remaining_s())
        inner = await trd.call("t.c.inner", None)
        return [Answer(inner) for _ in requests]

    async def inner(request: None, context: trd.Context) -> str:
        remaining.append(context.remaining_s())
        return "inner"

    remaining: list[float | None] = []
    async with served(answer) as (worker, here):
        await worker.serve("t.c.inner", inner)
        calls = (here.call(ANSWER, Question("a"), timeout=timeout_s) for timeout_s in (PATIENCE_S, 3 * PATIENCE_S))
        assert await each(*calls) == [Answer("inner")] * 2
        assert all(left is not None and left > 2 * PATIENCE_S for left in remaining)
        remaining.clear()
        await each(here.call(ANSWER, Question("a"), timeout=PATIENCE_S), here.call(ANSWER, Question("b")))
        assert remaining == [None, None]


async def test_a_caller_that_leaves_does_not_stop_the_batch_and_all_callers_do():
    @trd.batched(max_size=2, max_wait_s=LONG_S)
    async def answer(requests: list[Question]) -> list[Answer]:
        began.set()
        try:
            await end.wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return [Answer(request.text) for request in requests]

    began, end, cancelled = asyncio.Event(), asyncio.Event(), list[bool]()
    async with served(answer) as (_, here):
        leaver, stayer = (asyncio.create_task(here.call(ANSWER, Question(text))) for text in "ab")
        await patiently(began.wait())
        leaver.cancel()
        await each(leaver)
        end.set()
        assert await patiently(stayer) == Answer("b")
        assert not cancelled
        began.clear()
        end.clear()
        both = [asyncio.create_task(here.call(ANSWER, Question(text))) for text in "cd"]
        await patiently(began.wait())
        for call in both:
            call.cancel()
        await each(*both)
        await until(lambda: cancelled)
        await until(lambda: answer.statistics().running == 0)


@pytest.mark.parametrize("max_size", [2, 32], ids=["full", "after the delay"])
async def test_a_batch_has_the_variables_of_the_endpoint_and_not_those_of_a_request(max_size):
    @trd.batched(max_size=max_size, max_wait_s=1 * MS)
    async def inner(requests: list[Question]) -> list[Answer]:
        return [Answer(f"{of_endpoint.get()} {of_request.get()}") for _ in requests]

    async def answer(request: Question) -> Answer:
        of_request.set(request.text)
        return await inner(request)

    of_endpoint.set("endpoint")
    async with served(answer) as (_, here):
        of_endpoint.set("later")
        answers = await each(here.call(ANSWER, Question("a")), here.call(ANSWER, Question("b")))
    assert answers == [Answer("endpoint none")] * 2


async def test_the_clean_up_of_a_batch_that_all_have_left_may_call():
    @trd.batched(max_wait_s=0)
    async def answer(requests: list[Question]) -> list[Answer]:
        context = trd.current_context()
        assert context is not None
        began.set()
        try:
            await context.stopped()  # It ends when all callers have left, also in a thread.
        finally:
            seen.append((context.is_killed(), await trd.call("t.c.inner", None)))
        return []

    async def inner(request: None) -> str:
        return "cleaned"

    began, seen = asyncio.Event(), list[tuple[bool, str]]()
    async with served(answer) as (worker, here):
        await worker.serve("t.c.inner", inner)
        call = asyncio.create_task(here.call(ANSWER, Question("a")))
        await patiently(began.wait())
        call.cancel()
        await each(call)
        await until(lambda: seen)
        await until(lambda: answer.statistics().running == 0)
    assert seen == [(True, "cleaned")]


async def test_a_deadline_ends_a_request_that_waits_and_the_batch_has_the_others():
    @trd.batched(max_size=2, max_wait_s=LONG_S)
    async def answer(requests: list[Question]) -> list[Answer]:
        sizes.append([request.text for request in requests])
        return [Answer(request.text) for request in requests]

    sizes: list[list[str]] = []
    async with served(answer) as (_, here):
        with pytest.raises(trd.DeadlineExceeded):
            await here.call(ANSWER, Question("late"), timeout=20 * MS)
        await until(lambda: answer.statistics().waiting == 0)
        assert await each(here.call(ANSWER, Question("a")), here.call(ANSWER, Question("b"))) == [
            Answer("a"),
            Answer("b"),
        ]
    assert sizes == [["a", "b"]]


async def test_requests_go_by_the_priority_of_their_calls():
    @trd.batched(max_size=1, max_wait_s=0)
    async def answer(requests: list[Question]) -> list[Answer]:
        order.append(requests[0].text)
        await go.wait()
        return [Answer(requests[0].text)]

    order, go = list[str](), asyncio.Event()
    async with served(answer) as (_, here):
        calls = [asyncio.create_task(here.call(ANSWER, Question("first")))]
        await until(lambda: order)
        for priority in (-5, 5):
            calls.append(asyncio.create_task(here.call(ANSWER, Question(str(priority)), priority=priority)))
        await until(lambda: answer.statistics().waiting == 2)
        go.set()
        await each(*calls)
    assert order == ["first", "5", "-5"]


@pytest.mark.parametrize("kind", ["async", "plain"])
async def test_a_drain_answers_the_batch_that_runs_and_the_requests_that_wait(kind):
    began, end = threading.Event(), threading.Event()

    if kind == "plain":

        @trd.batched(max_size=2, max_wait_s=1 * MS)
        def answer(requests: list[Question]) -> list[Answer]:
            began.set()
            assert end.wait(PATIENCE_S)
            return [Answer(request.text) for request in requests]
    else:

        @trd.batched(max_size=2, max_wait_s=1 * MS)
        async def answer(requests: list[Question]) -> list[Answer]:
            began.set()
            await until(end.is_set)
            return [Answer(request.text) for request in requests]

    async with served(answer) as (worker, here):
        calls = [asyncio.create_task(here.call(ANSWER, Question(text))) for text in "abc"]
        await until(lambda: began.is_set() and answer.statistics().waiting == 1)
        worker.runtime.shutdown()
        end.set()
        assert await each(*calls) == [Answer("a"), Answer("b"), Answer("c")]


async def test_a_shutdown_that_does_not_wait_cancels_what_runs_and_what_waits():
    @trd.batched(max_size=1, max_wait_s=0)
    async def answer(requests: list[Question]) -> list[Answer]:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(requests[0].text)
        raise AssertionError

    ended: list[str] = []
    async with served(answer, graceful_shutdown=False) as (worker, here):
        calls = [asyncio.create_task(here.call(ANSWER, Question(text))) for text in "ab"]
        await until(lambda: answer.statistics().waiting == 1 and answer.statistics().running == 1)
        worker.runtime.shutdown()
        errors = await each(*calls)
        assert all(isinstance(error, trd.TritonError) for error in errors)
        await until(lambda: answer.statistics().running == 0)
    assert ended == ["a"]


async def test_a_max_inflight_below_the_batch_is_reported(caplog: pytest.LogCaptureFixture):
    @trd.batched(max_size=8, max_batches=2, max_wait_s=0)
    async def answer(requests: list[Question]) -> list[Answer]:
        return [Answer(request.text) for request in requests]

    with pytest.raises(ValueError, match=r"max_inflight=15: the batches of .*answer take 16 requests"):
        trd.serve(ANSWER, max_inflight=15)(answer)
    async with served(answer, max_inflight=15) as (_, here):
        with caplog.at_level(logging.WARNING):
            assert await here.call(ANSWER, Question("a")) == Answer("a")
            assert await here.call(ANSWER, Question("b")) == Answer("b")
    (words,) = [each.message for each in caplog.records if "max_inflight" in each.message]
    assert "max_size × max_batches = 16: serve it with max_inflight=32 or more" in words


async def test_a_rejected_request_says_which_queue_rejected_it():
    @trd.batched(max_size=1, max_wait_s=0, policy=trd.QueuePolicy(max_waiting=1))
    async def answer(requests: list[Question]) -> list[Answer]:
        await end.wait()
        return [Answer(request.text) for request in requests]

    end = asyncio.Event()
    async with served(answer) as (_, here):
        calls = [asyncio.create_task(here.call(ANSWER, Question(text))) for text in "ab"]
        await until(lambda: answer.statistics().waiting == 1)
        with pytest.raises(trd.Overloaded, match=r"t/components/c/e.* took the request of priority 0: 1 requests wait"):
            await here.call(ANSWER, Question("c"))
        end.set()
        assert await each(*calls) == [Answer("a"), Answer("b")]


async def test_a_direct_call_needs_no_worker():
    @trd.batched(max_size=2, max_wait_s=LONG_S)
    def answer(requests: list[Question]) -> list[Answer]:
        return [Answer(request.text) for request in requests]

    assert await each(answer(Question("a")), answer(Question("b"))) == [Answer("a"), Answer("b")]
    first, second = asyncio.create_task(answer(Question("c"))), asyncio.create_task(answer(Question("d")))
    await until(lambda: answer.statistics().batches == 2)
    first.cancel()  # A thread cannot be interrupted: the other caller gets its answer.
    assert await patiently(second) == Answer("d")
