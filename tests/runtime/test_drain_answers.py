"""What a drain owes to clients: answers that are made arrive, however slow their reader; what has not begun goes elsewhere."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.runtime.cluster import Cluster, drained, patiently, turns, until
from tests.runtime.programs import program
from tests.timing import MS, PATIENCE_S
from tests.transport.sessions import FOREVER, Peer, peer
from triton_distributed.errors import TritonError
from triton_distributed.names import EndpointName, Instance
from triton_distributed.runtime import Client, DistributedRuntime
from triton_distributed.transport import session
from triton_distributed.wire import frames as f
from triton_distributed.wire.hello import Hello, hello_frame

WINDOW = 1 << 30
HELLO = hello_frame(Hello(window=WINDOW))
# Together more than any kernel keeps for one socket; each so small that its handler need not wait for the others'.
ANSWERS, SIZE = 5000, 3500


def instance_of(client: Client) -> Instance:
    (instance,) = client.candidates.table.instances
    return instance


def asking(instance: Instance, number: int, request: Any, name: str = "t.c.e") -> bytes:
    """Request `number` of a raw client, which takes any number of bytes unread."""
    prefix = f.REQUEST_PREFIX.pack(instance.id, EndpointName.parse(name).key, FOREVER, WINDOW, 0)
    return f.frame(f.REQUEST, number, prefix + msgspec.msgpack.encode(request), f.END)


class Read:
    """What a raw client has read until the end of its connection.

    Attributes:
        answers: bytes of the answer of each request that was answered to its end.
        refused: numbers of the requests that were refused.
        goaway: it was told that the worker goes.
    """

    def __init__(self) -> None:
        self.answers: dict[int, int] = {}
        self.refused: set[int] = set()
        self.goaway = False
        self._sizes: dict[int, int] = {}

    async def all_of(self, one: Peer) -> None:
        """Read to the end as a client does: it gives credit back and answers a PING."""
        try:
            while True:
                await self._take(one, *await one.frame())
        except asyncio.IncompleteReadError as end:
            assert end.partial == b""

    async def _take(self, one: Peer, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind in (f.DATA, f.BATCH, f.END_OF_STREAM):
            self._sizes[number] = self._sizes.get(number, 0) + len(payload)
            if flags & f.END:
                self.answers[number] = self._sizes.pop(number)
            await one.say(f.frame(f.CREDIT, number, f.UINT32.pack(len(payload))))
        elif kind == f.PING:
            await one.say(f.frame(f.PONG, 0, payload))
        elif kind == f.REJECT:
            self.refused.add(number)
        elif kind == f.GOAWAY:
            self.goaway = True


WORKER = f"""
import asyncio, sys
from triton_distributed.runtime import DistributedRuntime, triton_worker

@triton_worker()
async def main(runtime):
    begun = made = 0
    all_begun = asyncio.Event()

    async def handler(request):
        nonlocal begun, made
        begun += 1
        if begun == {ANSWERS}:
            all_begun.set()
        await all_begun.wait()  # the kernel takes the words that a handler begins as long as there are no answers
        yield "x" * {SIZE}
        made += 1
        if made == {ANSWERS}:
            print("made", flush=True)

    async def says_when_it_drains():
        await runtime.primary_token().cancelled()
        for _ in range(100):  # what a drain that waits for nobody takes
            await asyncio.sleep(0)
        print("draining", flush=True)

    saying = asyncio.create_task(says_when_it_drains())
    await runtime.endpoint("t.c.e").serve_endpoint(handler)
    await saying

if sys.argv[1] == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("listen", ["", "tcp://127.0.0.1:0"])
async def test_answers_that_the_kernel_had_no_room_for_are_read_before_the_worker_exits(
    listen: str, loop: str, unix: Cluster, tmp_path: Path
) -> None:
    async with program(tmp_path, WORKER, loop, environment={"TRD_LISTEN": listen} if listen else None) as worker:
        client = await unix.client()
        instance = instance_of(client)
        async with peer(instance.addresses[0]) as one:
            await one.say(HELLO, *(asking(instance, number, None) for number in range(1, ANSWERS + 1)))
            assert await worker.line() == "made"
            worker.signal(signal.SIGTERM)
            assert await worker.line() == "draining"
            read = Read()
            await read.all_of(one)
            assert len(read.answers) == ANSWERS
            assert min(read.answers.values()) >= SIZE
            assert read.goaway
        assert await worker.ended() == 0


async def flooding(request: Any) -> AsyncIterator[str]:
    while True:
        yield "x" * 10_000


async def stopped(worker: DistributedRuntime, one: Peer, instance: Instance, name: str) -> None:
    """Ask for a flood, as request 1, and read nothing of it until the kernel takes nothing more."""
    await one.say(HELLO, asking(instance, 1, None, name))
    listener = worker.worker.server._listener
    await until(lambda: any(each.paused for each in listener.sessions))


@pytest.fixture
async def endless(trd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    """Runtimes whose drains wait for ever, if they wait."""
    monkeypatch.setattr(session, "PART_S", 10 * PATIENCE_S)
    made = Cluster(discovery="file", directory=trd_dir, drain_timeout_s=10 * PATIENCE_S)
    yield made
    await made.close()


async def test_a_client_that_is_well_does_not_hold_up_a_drain(endless: Cluster) -> None:
    async def echo(request: Any) -> Any:
        return request

    worker = await endless.worker(echo)
    client = await endless.client()
    calls = [asyncio.create_task(client.call("x" * SIZE)) for _ in range(200)]
    await patiently(calls[0])
    await patiently(worker.close())
    ended = await patiently(asyncio.gather(*calls, return_exceptions=True))
    assert all(each == "x" * SIZE or isinstance(each, TritonError) for each in ended)


async def test_who_has_said_nothing_does_not_hold_up_a_drain(endless: Cluster) -> None:
    worker = await endless.worker(flooding)
    instance = instance_of(await endless.client())
    async with peer(instance.addresses[0]) as one:
        assert (await one.frame())[0] == f.HELLO
        await patiently(worker.close())


async def test_a_client_that_does_not_say_that_it_has_read_holds_a_drain_up_for_so_long(
    unix: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "PART_S", 50 * MS)

    async def echo(request: Any) -> Any:
        return request

    worker = await unix.worker(echo)
    instance = instance_of(await unix.client())
    async with peer(instance.addresses[0]) as one:
        await one.say(HELLO, asking(instance, 1, "x"))
        while (await one.frame())[0] != f.DATA:
            pass
        loop = asyncio.get_running_loop()
        before = loop.time()
        await patiently(worker.close())
        assert loop.time() - before >= 49 * MS
        assert [each[0] for each in await one.hear()] == [f.GOAWAY, f.PING]


class Answers:
    """Answers that are all made at once, far more than the kernel has room for."""

    def __init__(self) -> None:
        self.made = self._begun = 0
        self._all_begun = asyncio.Event()

    async def __call__(self, request: Any) -> AsyncIterator[str]:
        self._begun += 1
        if self._begun == ANSWERS:
            self._all_begun.set()
        await self._all_begun.wait()
        yield "x" * SIZE
        self.made += 1

    async def asked(self, one: Peer, instance: Instance) -> None:
        """Ask for all of them, and wait until they are made."""
        await one.say(HELLO, *(asking(instance, number, None) for number in range(1, ANSWERS + 1)))
        await until(lambda: self.made == ANSWERS)


async def test_a_slow_reader_has_all_of_the_drain_to_take_its_answers(
    unix: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time to say that it has read them begins when the kernel has them."""
    monkeypatch.setattr(session, "PART_S", 50 * MS)
    answers = Answers()
    worker = await unix.worker(answers)
    instance = instance_of(await unix.client())
    async with peer(instance.addresses[0]) as one:
        await answers.asked(one, instance)
        closing = asyncio.create_task(worker.close())
        loop = asyncio.get_running_loop()
        later = loop.create_future()
        loop.call_later(200 * MS, later.set_result, None)
        await later
        assert not closing.done()
        monkeypatch.setattr(
            session, "PART_S", PATIENCE_S
        )  # From now on the peer reads, as fast as this machine allows.
        read = Read()
        await read.all_of(one)
        assert len(read.answers) == ANSWERS
        await patiently(closing)


async def test_a_client_that_reads_nothing_holds_a_drain_up_for_its_time(
    trd_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = Cluster(discovery="file", directory=trd_dir, drain_timeout_s=50 * MS)
    answers = Answers()
    worker = await cluster.worker(answers)
    instance = instance_of(await cluster.client())
    async with peer(instance.addresses[0]) as one:
        await answers.asked(one, instance)
        with caplog.at_level(logging.WARNING, "triton_distributed"):
            await patiently(worker.close())
        assert "some clients had not read their answers" in caplog.text
    await cluster.close()


@pytest.mark.any_loop
async def test_what_is_cut_before_it_began_is_refused(unix: Cluster) -> None:
    """It waits for the kernel to take the words that say so, and would run after them."""
    ran = False

    async def never(request: Any) -> None:
        nonlocal ran
        ran = True

    worker = await unix.worker(flooding, "t.c.flood", graceful_shutdown=False)
    await unix.serve(worker, never, graceful_shutdown=False)
    instance = instance_of(await unix.client())
    async with peer(instance.addresses[0]) as one:
        await stopped(worker, one, instance, "t.c.flood")
        await one.say(asking(instance, 2, None))
        stats = worker.stats()["t/components/c/e"]
        await until(lambda: stats.inflight)
        closing = asyncio.create_task(worker.close())
        await until(lambda: not stats.inflight)
        read = Read()
        await read.all_of(one)
        assert read.refused == {2}
        await patiently(closing)
    assert not ran


@pytest.mark.any_loop
async def test_what_has_not_begun_when_its_endpoint_is_served_no_longer_is_refused(unix: Cluster) -> None:
    ran = False

    async def never(request: Any) -> None:
        nonlocal ran
        ran = True

    worker = await unix.worker(flooding, "t.c.flood")
    serving = await unix.serve(worker, never)
    instance = instance_of(await unix.client())
    async with peer(instance.addresses[0]) as one:
        await stopped(worker, one, instance, "t.c.flood")
        await one.say(asking(instance, 2, None))
        stats = worker.stats()["t/components/c/e"]
        await until(lambda: stats.inflight)
        serving.cancel()
        await until(serving.done)
        assert not stats.inflight
        async with asyncio.timeout(PATIENCE_S):
            while (await one.frame())[::2] != (f.REJECT, 2):
                pass
    assert not ran


@pytest.mark.parametrize("later", range(6))
@pytest.mark.parametrize("where", ["memory", "unix"])
async def test_a_worker_that_closes_while_it_is_dialled(
    where: str, later: int, cluster: Cluster, unix: Cluster
) -> None:
    async def echo(request: Any) -> Any:
        return request

    runtimes = cluster if where == "memory" else unix
    worker = await runtimes.worker(echo)
    client = await runtimes.client()
    stream = client.generate(1, annotated=False)
    await turns(later)
    closing = asyncio.create_task(worker.close())
    try:
        assert await patiently(drained(stream)) == [1]
    except TritonError:
        pass  # refused, or never reached
    await patiently(closing)
