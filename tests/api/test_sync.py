"""Calls without an event loop: values, errors, threads, and what ends a call."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import contextvars
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

import triton_distributed as trd
from tests.api.other_thread import OtherThread
from tests.timing import MS, PATIENCE_S
from triton_distributed.api.sync_loop import SyncLoop
from triton_distributed.config import Config
from triton_distributed.errors import NotUnary, RuntimeClosed, WrongLoop


@dataclass
class Word:
    text: str


UPPER = trd.Unary[Word, Word]("t.sync.upper")
LETTERS = trd.Stream[Word, Word]("t.sync.letters")
LENGTHS = trd.Bidirectional[Word, int]("t.sync.lengths")


async def upper(request: Word) -> Word:
    return Word(request.text.upper())


async def letters(request: Word) -> AsyncIterator[Word]:
    for each in request.text:
        yield Word(each)


async def lengths(requests: AsyncIterator[Word]) -> AsyncIterator[int]:
    async for each in requests:
        yield len(each.text)


async def echo(request: Any) -> Any:
    return request


class Endless:
    """A handler that yields numbers until it is cancelled."""

    def __init__(self, worker: OtherThread, name: str = "t.sync.endless") -> None:
        self.begun = threading.Event()
        self.cancelled = threading.Event()
        worker.serve(name, self.numbers)

    async def numbers(self, request: Any) -> AsyncIterator[int]:
        self.begun.set()
        try:
            number = 0
            while True:
                yield number
                number += 1
                await asyncio.sleep(0)
        finally:
            self.cancelled.set()


class Silent:
    """A handler that never answers."""

    def __init__(self, worker: OtherThread, name: str = "t.sync.silent") -> None:
        self.begun = threading.Event()
        self.cancelled = threading.Event()
        worker.serve(name, self.wait)

    async def wait(self, request: Any) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()


# values


def test_answers_and_items_have_their_types(worker: OtherThread, sync: trd.SyncConnection) -> None:
    worker.serve(UPPER, upper)
    worker.serve(LETTERS, letters)
    worker.serve(LENGTHS, lengths)
    assert sync.call(UPPER, Word("abc"), timeout=PATIENCE_S) == Word("ABC")
    assert list(sync.stream(LETTERS, Word("xyz"))) == [Word("x"), Word("y"), Word("z")]
    assert list(sync.stream(LENGTHS, [Word("a"), Word("bc")])) == [1, 2]
    assert sync.call("t.sync.upper", {"text": "by name"}) == {"text": "BY NAME"}
    sync.wait_for_instances(UPPER)
    assert [each.id for each in sync.instances(UPPER)] == [worker.here.runtime.instance_id]
    assert 'triton_calls_total{endpoint="t.sync.upper",outcome="ok"} 2.0' in sync.metrics.text()


def test_none_is_a_value_and_next_reads_items(worker: OtherThread, sync: trd.SyncConnection) -> None:
    async def some(request: Any) -> AsyncIterator[Any]:
        for each in (None, 0, None):
            yield each

    worker.serve("t.sync.some", some)
    worker.serve("t.sync.echo", echo)
    assert sync.call("t.sync.echo", None) is None
    stream = sync.stream("t.sync.some", 1)
    assert next(stream) is None
    assert list(stream) == [0, None]
    with pytest.raises(RuntimeError, match="already read to its end"):
        iter(stream)


def test_the_request_is_taken_when_stream_returns(worker: OtherThread, sync: trd.SyncConnection) -> None:
    worker.serve("t.sync.echo", echo)
    request = [1]
    items = sync.stream("t.sync.echo", request)
    request.append(2)
    assert list(items) == [[1]]


def test_what_is_ready_is_handed_over_at_once(
    worker: OtherThread, sync: trd.SyncConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    async def hundred(request: Any) -> AsyncIterator[int]:
        for each in range(100):
            yield each
            await asyncio.sleep(0)  # Each item is a message of its own.
        ended.set()

    worker.serve("t.sync.hundred", hundred)
    worker.serve("t.sync.echo", echo)
    items = sync.stream("t.sync.hundred", 1)
    assert ended.wait(PATIENCE_S)
    sync.call("t.sync.echo", 1)  # Its answer arrives after all items, which were sent before.
    hand_overs: list[str] = []
    run = SyncLoop.run

    def counted(self: SyncLoop, operation: str, *arguments: Any) -> Any:
        hand_overs.append(operation)
        return run(self, operation, *arguments)

    monkeypatch.setattr(SyncLoop, "run", counted)
    assert list(items) == list(range(100))
    assert len(hand_overs) == 2, "one for all items, and one for the end"


def test_a_slow_reader_holds_the_handler_back(worker: OtherThread) -> None:
    yielded = 0

    async def blocks(request: Any) -> AsyncIterator[bytes]:
        nonlocal yielded
        for _ in range(1000):
            yielded += 1
            yield bytes(8 * 1024)

    worker.serve("t.sync.blocks", blocks)
    worker.serve("t.sync.echo", echo)
    with trd.connect_sync(Config.from_env(window_bytes=32 * 1024)) as here:
        items = here.stream("t.sync.blocks", 1)
        for _ in range(10):
            next(items)
        stalled = seen = 0
        while stalled < 50:  # So many calls are answered meanwhile.
            here.call("t.sync.echo", 1)
            stalled, seen = (stalled + 1, seen) if yielded == seen else (0, yielded)
        assert yielded <= 10 + 3 * 4, "it is at most some windows ahead"
        assert len(list(items)) == 990


# errors


async def raises(request: Any) -> None:
    raise KeyError(request)


async def two(request: Any) -> AsyncIterator[int]:
    yield 1
    yield 2


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (("t.sync.raises", "missing"), KeyError),
        (("t.sync.two", 1), NotUnary),
        (("t.sync.upper", {"texts": 1}), trd.InvalidRequest),
        (("t.sync.echo", object()), TypeError),
        ((LETTERS, Word("a")), TypeError),
        (("t.sync", 1), ValueError),
        (("t.sync.echo", 1, {"timeout": "soon"}), ValueError),
        (("t.sync.echo", 1, {"timout": 1}), TypeError),
        (("t.sync.echo", 1, {"context": "req-1"}), TypeError),
        (("t.sync.nobody", 1, {"timeout": 200 * MS}), trd.NoInstances),
    ],
)
def test_errors_are_those_of_the_asynchronous_client(
    worker: OtherThread, sync: trd.SyncConnection, call: tuple[Any, ...], expected: type[Exception]
) -> None:
    worker.serve("t.sync.raises", raises)
    worker.serve("t.sync.two", two)
    worker.serve(UPPER, upper)
    worker.serve("t.sync.echo", echo)
    endpoint, request, *rest = call
    options: dict[str, Any] = rest[0] if rest else {}
    with pytest.raises(expected) as there:
        worker.run(worker.here.call(endpoint, request, **options))
    with pytest.raises(expected) as here:
        sync.call(endpoint, request, **options)
    assert type(here.value) is type(there.value)
    assert getattr(here.value, "args", None) == getattr(there.value, "args", None)


def test_an_error_comes_after_the_items_before_it(worker: OtherThread, sync: trd.SyncConnection) -> None:
    async def breaks(request: Any) -> AsyncIterator[int]:
        yield 1
        yield 2
        raise KeyError("broken")

    worker.serve("t.sync.breaks", breaks)
    items = sync.stream("t.sync.breaks", 1)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(KeyError, match="broken"):
        next(items)


def test_an_item_that_does_not_fit_comes_after_the_items_before_it(
    worker: OtherThread, sync: trd.SyncConnection
) -> None:
    ended = threading.Event()

    async def misfits(request: Any) -> AsyncIterator[Any]:
        for each in ({"text": "a"}, {"text": "b"}, {"text": 3}):
            yield each
            await asyncio.sleep(0)
        ended.set()

    worker.serve("t.sync.letters", misfits)
    worker.serve("t.sync.echo", echo)
    items = sync.stream(LETTERS, Word("a"))
    assert ended.wait(PATIENCE_S)
    sync.call("t.sync.echo", 1)
    assert [next(items), next(items)] == [Word("a"), Word("b")]
    with pytest.raises(ValueError, match="does not fit the contract"):
        next(items)


def test_a_call_within_an_event_loop_names_the_asynchronous_client(
    worker: OtherThread, sync: trd.SyncConnection
) -> None:
    worker.serve("t.sync.echo", echo)

    async def main() -> None:
        sync.call("t.sync.echo", 1)

    before = threading.active_count()
    with pytest.raises(RuntimeError, match=r"call\(\): an event loop.*trd\.connect\(\).*asyncio\.to_thread"):
        asyncio.run(main())
    assert threading.active_count() == before, "the call began nothing"
    sync.call("t.sync.echo", 1)
    with pytest.raises(RuntimeError, match=r"await here\.call"):
        asyncio.run(main())


def test_a_call_on_the_loop_of_the_calls_is_refused(
    worker: OtherThread, sync: trd.SyncConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.serve("t.sync.echo", echo)
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)  # Not even in a notebook.

    def policy(request: Any, instances: Any, load: Any) -> Any:
        return sync.call("t.sync.echo", 1)

    with pytest.raises(ValueError, match=r"policy raised RuntimeError: call\(\): an event loop.*trd\.connect\(\)"):
        sync.call("t.sync.echo", 1, policy=policy)


def test_a_notebook_may_wait_within_its_event_loop(
    worker: OtherThread, sync: trd.SyncConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.serve("t.sync.echo", echo)
    worker.serve(LETTERS, letters)
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)  # As IPython does.

    async def cell() -> Any:
        return sync.call("t.sync.echo", 1), [each.text for each in sync.stream(LETTERS, Word("ab"))]

    assert asyncio.run(cell()) == (1, ["a", "b"])


def test_an_asynchronous_client_in_another_thread_names_connect_sync(worker: OtherThread) -> None:
    with pytest.raises(WrongLoop, match=r"connect_sync\(\) in threads"):
        worker.here.stream("t.sync.echo", 1)
    with pytest.raises(WrongLoop, match=r"connect_sync\(\) in threads"):
        asyncio.run(worker.here.call("t.sync.echo", 1))


# threads


def test_many_threads_call_at_once(worker: OtherThread, sync: trd.SyncConnection) -> None:
    worker.serve("t.sync.echo", echo)
    worker.serve(LETTERS, letters)

    def calls(thread: int) -> list[Any]:
        text = "".join(each.text for each in sync.stream(LETTERS, Word(f"<{thread}>")))
        return [text, *(sync.call("t.sync.echo", [thread, number]) for number in range(50))]

    with ThreadPoolExecutor(16) as threads:
        for thread, got in enumerate(threads.map(calls, range(16))):
            assert got == [f"<{thread}>", *([thread, number] for number in range(50))]
    assert sum(each.name == "triton-distributed-sync" for each in threading.enumerate()) == 1


def test_a_call_sees_the_context_variables_of_its_thread(worker: OtherThread, sync: trd.SyncConnection) -> None:
    worker.serve("t.sync.echo", echo)
    variable = contextvars.ContextVar("variable", default="none")
    seen: list[str] = []

    def policy(request: Any, instances: Any, load: Any) -> Any:
        seen.append(variable.get())
        return instances[0]

    variable.set("set here")
    sync.call("t.sync.echo", 1, policy=policy)
    list(sync.stream("t.sync.echo", 1, policy=policy))
    assert seen == ["set here", "set here"]


# what is accepted


def test_accepted_waits_for_a_handler_and_raises_refusals(worker: OtherThread, sync: trd.SyncConnection) -> None:
    silent = Silent(worker)
    worker.serve("t.sync.full", Silent(worker, "t.sync.other").wait, max_inflight=1)
    items = sync.stream("t.sync.silent", 1)
    items.accepted()
    assert silent.begun.is_set()
    with sync.stream("t.sync.full", 1) as first:
        first.accepted()
        with pytest.raises(trd.Overloaded), sync.stream("t.sync.full", 1) as second:
            second.accepted()
    items.cancel()
    assert silent.cancelled.wait(PATIENCE_S)


def test_a_request_that_was_sent_runs_to_its_end(worker: OtherThread, sync: trd.SyncConnection) -> None:
    release, ended = threading.Event(), threading.Event()

    def slow(request: Any) -> None:
        assert release.wait(PATIENCE_S)
        ended.set()

    worker.serve("t.sync.slow", slow)
    sync.send("t.sync.slow", 1)
    release.set()
    assert ended.wait(PATIENCE_S)
    worker.serve(UPPER, upper)
    with pytest.raises(trd.InvalidRequest):
        sync.send("t.sync.upper", {"texts": 1})


# what cancels


def leave_by_break(here: trd.SyncConnection) -> None:
    for each in here.stream("t.sync.endless", 1):
        if each == 10:
            break


def leave_by_exception(here: trd.SyncConnection) -> None:
    with contextlib.suppress(LookupError):
        for each in here.stream("t.sync.endless", 1):
            if each == 10:
                raise LookupError


def leave_the_block(here: trd.SyncConnection) -> None:
    with here.stream("t.sync.endless", 1) as items:
        next(items)
    with pytest.raises(trd.StreamClosed, match="was left"):
        next(items)


def close(here: trd.SyncConnection) -> None:
    with contextlib.closing(here.stream("t.sync.endless", 1)) as items:
        next(items)
    with pytest.raises(trd.StreamClosed, match=r"close\(\) was called"):
        next(items)


def drop_after_next(here: trd.SyncConnection) -> None:
    next(here.stream("t.sync.endless", 1))


def drop_in_a_cycle(here: trd.SyncConnection) -> None:
    cycle: list[Any] = [here.stream("t.sync.endless", 1)]
    cycle.append(cycle)
    next(cycle[0])
    del cycle
    gc.collect()


def cancel(here: trd.SyncConnection) -> None:
    items = here.stream("t.sync.endless", 1)
    with pytest.raises(asyncio.CancelledError):
        for each in items:
            if each == 10:
                assert items.cancel()
    assert not items.cancel()


def held_and_left(here: trd.SyncConnection) -> None:
    items = here.stream("t.sync.endless", 1)
    for each in items:
        if each == 10:
            break
    with pytest.raises(trd.StreamClosed):
        next(items)


@pytest.mark.parametrize(
    "leave",
    [
        leave_by_break,
        leave_by_exception,
        leave_the_block,
        close,
        drop_after_next,
        drop_in_a_cycle,
        cancel,
        held_and_left,
    ],
    ids=lambda each: each.__name__,
)
def test_leaving_a_stream_cancels_its_handler(
    worker: OtherThread, sync: trd.SyncConnection, leave: Callable[[trd.SyncConnection], None]
) -> None:
    endless = Endless(worker)
    leave(sync)
    assert endless.cancelled.wait(PATIENCE_S)


def test_a_stream_that_is_dropped_unread_cancels_its_handler(worker: OtherThread, sync: trd.SyncConnection) -> None:
    silent = Silent(worker)
    items = sync.stream("t.sync.silent", 1)
    assert silent.begun.wait(PATIENCE_S)
    assert items.instance_id == worker.here.runtime.instance_id
    assert items.request_id
    assert repr(items) == "<SyncItemStream open, 0 items received>"
    del items
    assert silent.cancelled.wait(PATIENCE_S)


def test_another_thread_cancels_a_reader(worker: OtherThread, sync: trd.SyncConnection) -> None:
    silent = Silent(worker)
    items = sync.stream("t.sync.silent", 1)
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(list, items)
        assert silent.begun.wait(PATIENCE_S)
        assert items.cancel()
        with pytest.raises(asyncio.CancelledError):
            reading.result(PATIENCE_S)
    assert silent.cancelled.wait(PATIENCE_S)


def test_a_timeout_ends_a_call(worker: OtherThread, sync: trd.SyncConnection) -> None:
    silent = Silent(worker)
    timeout = 50 * MS
    while not silent.begun.is_set():  # A busy machine may need longer to begin.
        with pytest.raises(trd.DeadlineExceeded, match="t/components/sync/silent"):
            sync.call("t.sync.silent", 1, timeout=timeout)
        timeout *= 2
    assert silent.cancelled.wait(PATIENCE_S)


# life


def test_connections_with_equal_settings_share_one_loop(worker: OtherThread) -> None:
    worker.serve("t.sync.echo", echo)
    with trd.connect_sync() as one, trd.connect_sync() as other, trd.connect_sync(Config.from_env(retries=0)) as third:
        assert [each.call("t.sync.echo", 1) for each in (one, other, third)] == [1, 1, 1]
        assert [each.name for each in threading.enumerate()].count("triton-distributed-sync") == 1
        one.close()
        assert other.call("t.sync.echo", 2) == 2
        with pytest.raises(RuntimeClosed):
            one.call("t.sync.echo", 3)
        one.close()
    assert "triton-distributed-sync" not in [each.name for each in threading.enumerate()]
    with trd.connect_sync() as again:
        assert again.call("t.sync.echo", 4) == 4


def test_a_connection_that_was_never_used_begins_nothing(trd_dir: Any) -> None:
    before = threading.active_count()
    with trd.connect_sync() as here:
        assert threading.active_count() == before
        assert repr(here) == "<SyncConnection not used yet>"


def test_close_ends_the_calls_of_other_threads(worker: OtherThread) -> None:
    silent = Silent(worker)
    here = trd.connect_sync()
    with ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(here.call, "t.sync.silent", 1)
        assert silent.begun.wait(PATIENCE_S)
        here.close()
        with pytest.raises((RuntimeClosed, trd.StreamIncomplete, asyncio.CancelledError)):
            waiting.result(PATIENCE_S)
    assert silent.cancelled.wait(PATIENCE_S)


def test_many_threads_open_and_close(worker: OtherThread) -> None:
    worker.serve("t.sync.echo", echo)

    def use(number: int) -> Any:
        with trd.connect_sync() as here:
            return here.call("t.sync.echo", number)

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(use, range(40))) == list(range(40))


def test_replaced_threads_are_refused(trd_dir: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("_thread.start_new_thread", lambda *_: None)  # As gevent and eventlet do.
    with trd.connect_sync() as here, pytest.raises(RuntimeError, match="gevent or eventlet"):
        here.call("t.sync.echo", 1)


# requests that stream


def test_a_generator_of_requests_waits_in_a_thread_of_its_own(worker: OtherThread, sync: trd.SyncConnection) -> None:
    worker.serve(LENGTHS, lengths)
    answered = threading.Semaphore(0)
    seen: list[str] = []

    def words() -> Iterator[Word]:
        for number in range(5):
            seen.append(threading.current_thread().name)
            yield Word("x" * number)
            assert answered.acquire(timeout=PATIENCE_S)  # The answer to each comes before the next is asked for.

    got = []
    for each in sync.stream(LENGTHS, words()):
        got.append(each)
        answered.release()
    assert got == [0, 1, 2, 3, 4]
    assert set(seen) == {"triton-distributed-requests"}
    assert list(sync.stream("t.sync.lengths", iter([{"text": "abc"}]))) == [3]


def test_an_error_of_the_requests_reaches_the_caller(worker: OtherThread, sync: trd.SyncConnection) -> None:
    worker.serve(LENGTHS, lengths)

    def words() -> Iterator[Word]:
        yield Word("a")
        raise LookupError("no more words")

    with pytest.raises(LookupError, match="no more words"):
        list(sync.stream(LENGTHS, words()))
    several: list[Any] = [Word("alone"), letters(Word("a"))]
    for wrong in several:
        with pytest.raises(TypeError, match="not a plain iterable"):
            sync.stream(LENGTHS, wrong)


def test_leaving_closes_the_generator_of_requests(worker: OtherThread, sync: trd.SyncConnection) -> None:
    worker.serve(LENGTHS, lengths)
    closed = threading.Event()

    def words() -> Iterator[Word]:
        try:
            while True:
                yield Word("abc")
        finally:
            closed.set()

    for each in sync.stream(LENGTHS, words()):
        assert each == 3
        break
    assert closed.wait(PATIENCE_S)
