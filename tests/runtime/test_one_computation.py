"""A plain handler is one computation: one thread and one context, from its first step to the end of its clean-up.

Else whatever is set around a `yield` is lost or left behind: spans, `decimal.localcontext`, `torch.no_grad`, CUDA
streams, database connections.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, into, patiently, turns, until
from triton_distributed.runtime import current_context, triton_endpoint
from triton_distributed.serving.plain import AHEAD

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="not set")
local = threading.local()


class Steps:
    """The steps of one handler, with what each of them saw.

    Attributes:
        seen: the thread, the context variable, the thread's own variable and the request, of each step.
        wrong: what could not be set back.
        over: set at the end of the clean-up.
    """

    def __init__(self) -> None:
        self.seen: set[tuple[int, str, str, object]] = set()
        self.wrong: list[Exception] = []
        self.over = threading.Event()

    def note(self) -> None:
        self.seen.add((threading.get_ident(), variable.get(), getattr(local, "mode", "not set"), current_context()))

    def items(self, count: int, last: Callable[[], object]) -> Iterator[Any]:
        token = variable.set("set")
        local.mode = "set"
        try:
            for number in range(count):
                self.note()
                yield number
            yield last()
        finally:
            self.note()
            del local.mode
            try:
                variable.reset(token)
            except ValueError as error:
                self.wrong.append(error)
            self.over.set()

    def check(self) -> None:
        assert self.wrong == []
        ((thread, *values, context),) = self.seen
        assert thread != threading.get_ident()
        assert values == ["set", "set"]
        assert context is not None


def fails() -> object:
    raise ValueError("it failed")


def kinds(items: Callable[[], Iterator[Any]]) -> dict[str, Any]:
    def generator(request: Any) -> Iterator[Any]:
        yield from items()

    async def later(request: Any) -> Any:
        return items()

    return {
        "generator": generator,
        "returned": lambda request: items(),
        "returned by an async function": later,
        "chain": lambda request: itertools.chain(items()),
        "decorated": triton_endpoint(int, object)(generator),
    }


KINDS = list(kinds(lambda: iter(())))
LAST = {"to its end": lambda: "last", "it fails": fails, "an item cannot travel": object, "left early": fails}


@pytest.mark.any_loop
@pytest.mark.parametrize("reads", ["at once", "slowly"])
@pytest.mark.parametrize("ends", LAST)
@pytest.mark.parametrize("kind", KINDS)
async def test_one_thread_and_one_context(kind: str, ends: str, reads: str, cluster: Cluster) -> None:
    steps, count = Steps(), 2 * AHEAD + 1
    client = await cluster.connect(kinds(lambda: steps.items(count, LAST[ends]))[kind])
    found: list[Any] = []

    async def read() -> None:
        async for item in client.generate(1, annotated=False):
            found.append(item)
            if reads == "slowly":
                await turns(3)
            if ends == "left early" and len(found) == AHEAD:
                return

    if ends in ("it fails", "an item cannot travel"):
        with pytest.raises((ValueError, TypeError), match="it failed|cannot travel"):
            await patiently(read())
        assert found == list(range(count))
    else:
        await patiently(read())
        assert found == ([*range(count), "last"] if ends == "to its end" else list(range(AHEAD)))
    await until(steps.over.is_set)
    steps.check()


async def test_many_at_once_keep_theirs() -> None:
    """More generators than places, each of which parks again and again."""
    cluster = Cluster(threads=2)
    every: list[Steps] = []

    def handler(request: Any) -> Iterator[Any]:
        every.append(Steps())
        yield from every[-1].items(request, lambda: "last")

    client = await cluster.connect(handler)
    count = 3 * AHEAD
    found = await patiently(asyncio.gather(*(drained(client.generate(count, annotated=False)) for _ in range(20))))
    assert found == [[*range(count), "last"]] * 20
    assert len(every) == 20
    for steps in every:
        await until(steps.over.is_set)
        steps.check()
    await cluster.close()


async def test_one_that_is_not_read_is_closed_in_its_thread_at_shutdown(cluster: Cluster) -> None:
    steps = Steps()
    worker = cluster.runtime(drain_timeout_s=0.01)
    await cluster.serve(worker, lambda request: steps.items(100_000, fails))
    client = await cluster.client()
    stream = client.generate(1)
    await patiently(anext(stream))
    await patiently(worker.close())
    await until(steps.over.is_set)
    steps.check()
    stream.cancel()


async def test_what_a_wrapper_sets_holds_for_what_it_returns(cluster: Cluster) -> None:
    """A plain function around an async handler runs in a thread: the handler goes on in the same context, on the loop."""
    seen: list[str] = []

    def wrapped(handler: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
        @functools.wraps(handler)
        def wrapper(request: Any) -> Any:
            return handler(request, variable.set(request))

        return wrapper

    async def note(token: contextvars.Token[str]) -> None:
        seen.append(variable.get())
        await asyncio.sleep(0)
        seen.append(variable.get())
        assert current_context() is not None

    @wrapped
    async def answers(request: Any, token: Any) -> Any:
        try:
            await note(token)
            return request
        finally:
            variable.reset(token)

    @wrapped
    async def yields(request: Any, token: Any) -> AsyncIterator[Any]:
        try:
            for n in range(3):
                await note(token)
                yield n
        finally:
            variable.reset(token)

    @wrapped
    async def returns_plain(request: Any, token: Any) -> Any:
        def items() -> Iterator[Any]:
            seen.append(variable.get())
            yield request
            variable.reset(token)

        return items()

    @wrapped
    async def fails_later(request: Any, token: Any) -> Any:
        try:
            async with asyncio.timeout(0.001):
                await asyncio.Event().wait()
        finally:
            variable.reset(token)

    worker = cluster.runtime()
    handlers = {"answers": answers, "yields": yields, "plain": returns_plain, "fails": fails_later}
    clients = {}
    for name, handler in handlers.items():
        await cluster.serve(worker, handler, f"t.c.{name}")
        clients[name] = await cluster.client(f"t.c.{name}")
    assert await patiently(clients["answers"].call("a")) == "a"
    assert seen == ["a", "a"]
    assert await patiently(drained(clients["yields"].generate("y", annotated=False))) == [0, 1, 2]
    assert seen[2:] == ["y"] * 6
    async for _ in clients["yields"].generate("left", annotated=False):
        break
    assert await patiently(clients["plain"].call("p")) == "p"
    assert seen[-1] == "p"
    with pytest.raises(TimeoutError):
        await patiently(clients["fails"].call("f"))
    assert variable.get() == "not set"


async def test_a_cancelled_wrapper_is_cancelled_where_it_waits(cluster: Cluster) -> None:
    ended = asyncio.Event()

    async def handler(request: Any, token: contextvars.Token[str]) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            variable.reset(token)
            ended.set()

    began = asyncio.Event()
    client = await cluster.connect(lambda request: handler(request, variable.set("set")))
    call = asyncio.ensure_future(client.call(1))
    await patiently(began.wait())
    call.cancel()
    await patiently(ended.wait())


async def test_slow_readers_do_not_stop_other_plain_handlers() -> None:
    """A hundred generators wait for readers that read nothing, with one place for all."""
    cluster = Cluster(threads=1)
    produced = [0] * 100

    def endless(request: int) -> Iterator[str]:
        while True:
            produced[request] += 1
            yield "x" * 1000

    def quick(request: Any) -> Any:
        return request

    worker = await cluster.worker(endless)
    await cluster.serve(worker, quick, "t.c.quick")
    client, other = await cluster.client(), await cluster.client("t.c.quick")
    streams = [client.generate(n, annotated=False) for n in range(len(produced))]
    await until(lambda: all(produced))
    for n in range(20):
        assert await patiently(other.call(n)) == n
    found = [await patiently(anext(each)) for each in streams]  # and each of them goes on
    assert found == ["x" * 1000] * len(streams)
    for each in streams:
        each.cancel()
    assert await patiently(other.call("after")) == "after"
    await cluster.close()


async def test_what_fails_while_a_generator_is_closed_is_logged(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    def handler(request: Any) -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            raise ValueError("the lock is gone")

    client = await cluster.connect(handler)
    async for _ in client.generate(1):
        break
    await until(lambda: "the lock is gone" in caplog.text)


async def test_nothing_of_a_request_that_was_left_before_it_began_runs() -> None:
    cluster = Cluster(threads=1)
    release, ran = threading.Event(), []

    def blocks(request: Any) -> Any:
        release.wait(20)

    def handler(request: Any) -> Iterator[Any]:
        ran.append(request)
        yield request

    worker = await cluster.worker(blocks)
    await cluster.serve(worker, handler, "t.c.other")
    client, other = await cluster.client(), await cluster.client("t.c.other")
    blocked = asyncio.ensure_future(client.call(1))
    stats = worker.stats()
    await until(lambda: stats["t/components/c/e"].inflight)
    stream, later = other.generate("left"), asyncio.ensure_future(other.call("later"))
    await until(lambda: stats["t/components/c/other"].inflight == 2)
    stream.cancel()
    await until(lambda: stats["t/components/c/other"].inflight == 1)  # at once, not when the thread is free
    assert not blocked.done()
    release.set()
    assert await patiently(later) == "later"
    await patiently(blocked)
    assert ran == ["later"]
    await cluster.close()


async def test_items_come_before_what_ended_them(cluster: Cluster) -> None:
    def handler(request: int) -> Iterator[Any]:
        yield from range(request)
        yield {"a": [0, object()]}

    client = await cluster.connect(handler)
    for count in (0, 1, AHEAD - 1, AHEAD, AHEAD + 1):
        items: list[Any] = []
        with pytest.raises(TypeError, match=r'item\["a"\]\[1\]'):
            await into(items, client.generate(count, annotated=False))
        assert items == list(range(count))
