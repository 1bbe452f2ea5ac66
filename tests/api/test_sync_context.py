"""Calls without an event loop inherit the request of the handler that makes them, and follow a context."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import triton_distributed as trd
from tests.api.other_thread import OtherThread
from tests.timing import MS, PATIENCE_S
from triton_distributed.context import awaited_requests


class Inner:
    """The handler that is called by another one, or with a context."""

    def __init__(self, worker: OtherThread) -> None:
        self.begun = threading.Event()
        self.cancelled = threading.Event()
        self.contexts: list[trd.Context] = []
        worker.serve("t.sync.look", self.look)
        worker.serve("t.sync.wait", self.wait)
        worker.serve("t.sync.stop", self.until_stopped)

    async def look(self, request: Any, context: trd.Context) -> Any:
        return [context.id(), context.remaining_s(), context.priority, dict(context.metadata), dict(context.travelling)]

    async def wait(self, request: Any, context: trd.Context) -> None:
        self.contexts.append(context)
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()

    async def until_stopped(self, request: Any, context: trd.Context) -> AsyncIterator[str]:
        self.begun.set()
        await context.stopped()
        yield "stopped"


@pytest.fixture
def inner(worker: OtherThread) -> Inner:
    return Inner(worker)


def test_a_plain_handler_passes_its_request_on(worker: OtherThread, inner: Inner, sync: trd.SyncConnection) -> None:
    def outer(request: Any, context: trd.Context) -> Iterator[Any]:
        context.travel(user="ada")
        yield sync.call("t.sync.look", 1)
        yield next(sync.stream("t.sync.look", 1, metadata={"own": 1}))
        yield sync.call("t.sync.look", 1, context=context, timeout=1 * PATIENCE_S)
        assert not context._calls, "an ended call is forgotten"

    worker.serve("t.sync.outer", outer)
    given = trd.Context(id="REQ-1", metadata={"given": 1})
    first, second, third = sync.stream("t.sync.outer", 1, context=given, priority=7, timeout=PATIENCE_S / 2)
    for name, remaining, priority, _, travelling in (first, second, third):
        assert (name, priority, travelling) == ("REQ-1", 7, {"user": "ada"})
        assert 0 < remaining <= PATIENCE_S / 2
    assert [each[3] for each in (first, second, third)] == [{}, {"own": 1}, {"given": 1}]


def test_the_deadline_of_the_handler_ends_its_calls(
    worker: OtherThread, inner: Inner, sync: trd.SyncConnection
) -> None:
    errors: list[BaseException] = []
    over = threading.Event()

    def outer(request: Any) -> None:
        try:
            sync.call("t.sync.wait", 1)
        except BaseException as error:
            errors.append(error)
            over.set()
            raise

    worker.serve("t.sync.outer", outer)
    timeout = 50 * MS
    while not inner.begun.is_set():  # A busy machine may need longer to begin.
        with pytest.raises(trd.DeadlineExceeded):
            sync.call("t.sync.outer", 1, timeout=timeout)
        timeout *= 2
    assert over.wait(PATIENCE_S)
    assert isinstance(errors[-1], trd.DeadlineExceeded | asyncio.CancelledError)
    assert inner.cancelled.wait(PATIENCE_S)


@pytest.mark.parametrize("streams", [False, True], ids=["call", "stream"])
def test_leaving_the_outer_call_cancels_the_inner_one(
    worker: OtherThread, inner: Inner, sync: trd.SyncConnection, streams: bool
) -> None:
    ended = threading.Event()

    def outer(request: Any) -> Any:
        try:
            return list(sync.stream("t.sync.wait", 1)) if streams else sync.call("t.sync.wait", 1)
        finally:
            ended.set()

    worker.serve("t.sync.outer", outer)
    items = sync.stream("t.sync.outer", 1)
    assert inner.begun.wait(PATIENCE_S)
    items.cancel()
    assert inner.cancelled.wait(PATIENCE_S)
    assert ended.wait(PATIENCE_S)


def test_a_waiting_plain_handler_says_for_which_request(
    worker: OtherThread, inner: Inner, sync: trd.SyncConnection
) -> None:
    contexts: list[trd.Context] = []

    def outer(request: Any, context: trd.Context) -> Any:
        contexts.append(context)
        return sync.call("t.sync.wait", 1)

    worker.serve("t.sync.outer", outer)
    items = sync.stream("t.sync.outer", 1)
    assert inner.begun.wait(PATIENCE_S)
    (awaited,) = awaited_requests(contexts[0])
    assert (awaited.endpoint.endpoint, awaited.instance_id) == ("wait", worker.here.runtime.instance_id)
    items.cancel()
    assert inner.cancelled.wait(PATIENCE_S)


def test_a_context_is_cancelled_in_another_thread(inner: Inner, sync: trd.SyncConnection) -> None:
    context = trd.Context()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(sync.call, "t.sync.wait", 1, context=context)
        assert inner.begun.wait(PATIENCE_S)
        assert inner.contexts[0].id() == context.id()
        context.kill()
        with pytest.raises(asyncio.CancelledError):
            waiting.result(PATIENCE_S)
        assert inner.cancelled.wait(PATIENCE_S)
        with pytest.raises(asyncio.CancelledError):
            sync.call("t.sync.look", 1, context=context)


def test_a_context_stops_a_stream_in_another_thread(inner: Inner, sync: trd.SyncConnection) -> None:
    context = trd.Context()
    with ThreadPoolExecutor(1) as thread:
        items = sync.stream("t.sync.stop", 1, context=context)
        reading = thread.submit(list, items)
        assert inner.begun.wait(PATIENCE_S)
        context.stop_generating()
        assert reading.result(PATIENCE_S) == ["stopped"]
    assert not context._calls
