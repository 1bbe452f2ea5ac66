"""`Sender`: items that threads and callbacks push, bounded by the reading of the caller."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import triton_distributed as trd
from tests.runtime.cluster import Cluster, drained, into, patiently, until
from tests.timing import PATIENCE_S
from triton_distributed.annotated import Annotated
from triton_distributed.errors import RemoteError, SenderClosed
from triton_distributed.runtime import Context, Sender
from triton_distributed.serving.plain import AHEAD


@dataclass
class Token:
    id: int


class Engine:
    """An engine with a thread for each request, as engines with a thread that dispatches have."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []
        self.sent = 0
        self.left = 0

    def submit(self, work: Callable[[], Any]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.errors.append(error)

        thread = threading.Thread(target=run)
        self.threads.append(thread)
        thread.start()

    def pushes(self, items: Any, sender: Sender[Any]) -> None:
        def work() -> None:
            for each in items:
                sender.send(each)
                self.sent += 1
            sender.close()

        self.submit(work)

    def gone(self) -> None:
        self.left += 1

    def join(self) -> None:
        for each in self.threads:
            each.join(PATIENCE_S)
            assert not each.is_alive()


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.join()


async def test_a_thread_pushes_the_items(cluster: Cluster, engine: Engine) -> None:
    async def handler(count: int) -> Sender[Any]:
        sender = Sender[Any]()
        engine.pushes(range(count), sender)
        return sender

    client = await cluster.connect(handler)
    assert await patiently(drained(client.generate(1000, annotated=False))) == list(range(1000))
    assert await patiently(drained(client.generate(0, annotated=False))) == []
    assert engine.errors == []


async def test_several_threads_push_and_each_keeps_its_order(cluster: Cluster, engine: Engine) -> None:
    async def handler(request: int) -> Sender[Any]:
        sender = Sender[Any]()
        ended = threading.Barrier(4, action=sender.close)

        def work(number: int) -> None:
            for each in range(300):
                sender.send([number, each])
            ended.wait(PATIENCE_S)

        for number in range(4):
            engine.submit(lambda number=number: work(number))  # type: ignore[misc]
        return sender

    client = await cluster.connect(handler)
    items = await patiently(drained(client.generate(0, annotated=False)))
    for number in range(4):
        assert [each for who, each in items if who == number] == list(range(300))


async def test_send_blocks_while_the_caller_does_not_read(cluster: Cluster, engine: Engine) -> None:
    senders: list[Sender[Any]] = []
    item = "x" * 1000

    async def handler(request: int) -> Sender[Any]:
        sender = Sender[Any]()
        senders.append(sender)
        engine.pushes((item for _ in range(10_000)), sender)
        return sender

    client = await cluster.connect(handler)
    stream = client.generate(0, annotated=False)
    assert await patiently(anext(stream)) == item
    await until(lambda: senders and senders[0].full)
    before = -1
    while before != engine.sent:  # What the window and the session take comes first.
        before = engine.sent
        await asyncio.sleep(0.05)
    assert before < 2_000
    assert len(await patiently(drained(stream))) == 9_999
    senders.clear()


async def test_try_send_refuses_while_the_caller_does_not_read_and_a_callback_goes_on_later(cluster: Cluster) -> None:
    refused = asyncio.Event()

    async def handler(request: int) -> Sender[int]:
        sender = Sender[int]()
        loop, number = asyncio.get_running_loop(), 0

        def callback() -> None:
            nonlocal number
            while number < 5 * AHEAD:
                if not sender.try_send(number):
                    refused.set()
                    loop.call_soon(callback)
                    return
                number += 1
            sender.close()

        loop.call_soon(callback)
        return sender

    client = await cluster.connect(handler)
    assert await patiently(drained(client.generate(0, annotated=False))) == list(range(5 * AHEAD))
    assert refused.is_set()


async def test_asend_waits_on_the_loop(cluster: Cluster) -> None:
    tasks: list[asyncio.Task[None]] = []

    async def handler(request: int) -> Sender[int]:
        sender = Sender[int]()

        async def work() -> None:
            for each in range(5 * AHEAD):
                await sender.asend(each)
            sender.close()

        tasks.append(asyncio.create_task(work()))
        return sender

    client = await cluster.connect(handler)
    assert await patiently(drained(client.generate(0, annotated=False))) == list(range(5 * AHEAD))
    await patiently(tasks[0])


async def test_the_callers_leaving_ends_a_thread_that_waits(cluster: Cluster, engine: Engine) -> None:
    async def handler(request: int) -> Sender[Any]:
        sender = Sender[Any](on_left=engine.gone)
        engine.pushes(("x" * 1000 for _ in range(100_000)), sender)
        return sender

    client = await cluster.connect(handler)
    async for _ in client.generate(0):
        break
    await until(lambda: engine.errors)
    assert isinstance(engine.errors[0], SenderClosed)
    assert "the caller has left" in str(engine.errors[0])
    assert engine.left == 1


async def test_a_stop_reaches_an_engine_whose_handler_takes_no_context(cluster: Cluster) -> None:
    left = asyncio.Event()
    senders: list[Sender[int]] = []

    async def handler(request: int) -> Sender[int]:
        senders.append(Sender[int](on_left=left.set))
        senders[0].try_send(1)
        return senders[0]

    client = await cluster.connect(handler)
    context = Context()
    stream = client.generate(0, annotated=False, context=context)
    assert await patiently(anext(stream)) == 1
    context.stop_generating()
    assert await patiently(drained(stream)) == []
    await patiently(left.wait())
    with pytest.raises(SenderClosed):
        senders[0].try_send(2)


async def test_close_with_an_error_raises_it_at_the_caller_after_the_items(cluster: Cluster) -> None:
    async def handler(request: int) -> Sender[int]:
        sender = Sender[int]()
        sender.try_send(1)
        sender.close(KeyError("lost"))
        sender.close()
        return sender

    client = await cluster.connect(handler)
    items: list[Any] = []
    with pytest.raises(KeyError, match="lost"):
        await into(items, client.generate(0, annotated=False))
    assert items == [1]


async def test_a_dropped_sender_ends_the_stream_with_an_error(cluster: Cluster) -> None:
    async def handler(request: int) -> Sender[int]:
        sender = Sender[int]()
        sender.try_send(1)
        return sender

    client = await cluster.connect(handler)
    with pytest.raises(RemoteError, match="dropped without close"):
        await patiently(drained(client.generate(0)))


async def test_a_sender_that_its_handler_does_not_return_does_not_hold_its_thread(
    cluster: Cluster, engine: Engine
) -> None:
    async def handler(request: int) -> int:
        sender = Sender[Any]()
        engine.pushes(range(1000), sender)
        return 5

    client = await cluster.connect(handler)
    assert await patiently(client.call(0)) == 5
    await until(lambda: engine.errors)
    assert "without returning it" in str(engine.errors[0])


async def test_a_handler_that_sends_too_much_before_it_returns_is_told(cluster: Cluster) -> None:
    async def handler(request: int) -> Sender[int]:
        sender = Sender[int]()
        for each in range(AHEAD + 1):
            await sender.asend(each)
        sender.close()
        return sender

    client = await cluster.connect(handler)
    with pytest.raises(RemoteError, match="from a task or a thread"):
        await patiently(drained(client.generate(0)))


async def test_send_on_the_loop_and_asend_in_a_thread_are_refused(cluster: Cluster, engine: Engine) -> None:
    async def handler(request: int) -> Sender[str]:
        sender = Sender[str]()
        with pytest.raises(RuntimeError, match="asend"):
            sender.send("a")

        def work() -> None:
            with contextlib.closing(sender.asend("b")) as sending, pytest.raises(RuntimeError, match="use send"):
                sending.send(None)
            sender.send("c")
            sender.close()

        engine.submit(work)
        return sender

    client = await cluster.connect(handler)
    assert await patiently(drained(client.generate(0, annotated=False))) == ["c"]
    assert engine.errors == []


async def test_what_cannot_travel_raises_where_it_is_sent(cluster: Cluster, engine: Engine) -> None:
    async def handler(request: int) -> Sender[Any]:
        sender = Sender[Any]()

        def work() -> None:
            with pytest.raises(TypeError, match="cannot travel"):
                sender.send(object())
            sender.send({"ok": True})
            sender.close()

        engine.submit(work)
        return sender

    client = await cluster.connect(handler)
    assert await patiently(drained(client.generate(0, annotated=False))) == [{"ok": True}]
    assert engine.errors == []


async def test_an_item_is_what_it_was_when_it_was_sent(cluster: Cluster, engine: Engine) -> None:
    async def handler(request: int) -> Sender[Any]:
        sender = Sender[Any]()

        def work() -> None:
            buffer, item = bytearray(b"a" * 100_000), {"n": 0}
            sender.send(buffer)
            sender.send(item)
            buffer[:] = b"b" * 100_000
            item["n"] = 1
            sender.send(Annotated(None, "note"))
            sender.close()

        engine.submit(work)
        return sender

    client = await cluster.connect(handler)
    first, second, third = await patiently(drained(client.generate(0)))
    assert (bytes(first.data()), second.data(), third.event()) == (b"a" * 100_000, {"n": 0}, "note")


async def test_a_handler_is_tested_without_a_runtime(engine: Engine) -> None:
    async def handler(request: int) -> Sender[Any]:
        sender = Sender[Any]()
        engine.pushes([*range(request), "x" * 100_000], sender)
        return sender

    assert await patiently(drained(await handler(300))) == [*range(300), "x" * 100_000]


GENERATE = trd.Stream[int, Token]("t.c.typed")


async def test_a_contract_takes_a_handler_that_returns_one(engine: Engine) -> None:
    @trd.serve(GENERATE)
    async def generate(count: int) -> trd.Sender[Token]:
        sender = trd.Sender[Token]()
        engine.pushes((Token(each) for each in range(count)), sender)
        return sender

    async with trd.connect(trd.Config(discovery="memory")) as here:
        await here.serve(generate)
        assert [item async for item in here.stream(GENERATE, 3)] == [Token(0), Token(1), Token(2)]


def test_a_contract_refuses_a_sender_of_other_items() -> None:
    async def generate(count: int) -> trd.Sender[str]:
        return trd.Sender[str]()

    with pytest.raises(TypeError, match="it answers with str, not Token"):
        trd.serve(GENERATE)(generate)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="it makes a stream"):
        trd.serve(trd.Unary[int, str]("t.c.unary"))(generate)  # type: ignore[arg-type]


def test_a_sender_is_made_on_a_loop() -> None:
    with pytest.raises(RuntimeError, match="async handler"):
        Sender()


async def test_nothing_is_left_for_the_collector(cluster: Cluster, engine: Engine) -> None:
    async def handler(count: int) -> Sender[Any]:
        sender = Sender[Any]()
        engine.pushes(range(count), sender)
        return sender

    client = await cluster.connect(handler)
    await patiently(drained(client.generate(10)))
    engine.join()
    gc.collect()
    gc.disable()
    try:
        await patiently(drained(client.generate(10)))
        engine.join()
        engine.threads.clear()
        assert not [each for each in gc.get_objects() if isinstance(each, Sender)]
    finally:
        gc.enable()
