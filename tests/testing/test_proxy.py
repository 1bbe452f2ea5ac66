"""The fault proxy, and what sessions make of each fault."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

import pytest

from tests.timing import MS, PATIENCE_S
from tests.transport.sessions import HELLO, Lost, address_of, bodies, calling, first, messages, numbers, peer, serving
from triton_distributed.errors import ConfigError, ConnectionFailed
from triton_distributed.testing import FaultProxy
from triton_distributed.wire import frames as f

pytestmark = pytest.mark.any_loop
SCHEMES = ["tcp", "unix"]
LINGER_NOTHING = struct.pack("ii", 1, 0)


@pytest.fixture(params=SCHEMES)
async def service(request, trd_dir):
    async with serving(address_of(request.param, trd_dir)) as service:
        yield service


async def linked(proxy: FaultProxy, number: int = 1) -> None:
    """Wait until the proxy carries so many connections. Of the last it then knows the client alone."""
    async with asyncio.timeout(PATIENCE_S):
        while proxy.connections != number:
            await asyncio.sleep(0)


async def nothing_left(proxy: FaultProxy) -> None:
    await linked(proxy, 0)


async def test_without_faults_everything_is_carried(service):
    async with FaultProxy(service.address) as proxy, calling() as caller:
        assert proxy.address != service.address
        assert await numbers(await caller.call(proxy.address, b"count 5000")) == [*range(5000)]
        array = bytes(range(256)) * 20_000
        stream = await caller.call(proxy.address, b"array 1", array)
        async with asyncio.timeout(PATIENCE_S):
            ((_, (got,)),) = [each async for each in messages(stream)]
        assert bytes(got) == array
        assert proxy.connections == 1


async def test_connections_end_with_their_ends(service):
    async with FaultProxy(service.address) as proxy:
        async with calling() as caller:
            assert await numbers(await caller.call(proxy.address, b"count 1")) == [0]
        await nothing_left(proxy)


async def test_an_end_that_is_gone_in_the_middle_is_gone_at_the_other(service):
    async with FaultProxy(service.address) as proxy:
        async with calling() as caller:
            await first(await caller.call(proxy.address, b"count 10000000"))
            caller.made[0].transport.abort()
        async with asyncio.timeout(PATIENCE_S):
            await service.served[0].ended.wait()
        await nothing_left(proxy)
        async with calling() as caller:
            stream = await caller.call(proxy.address, b"count 10000000")
            await first(stream)
            service.accepted[1]._transport.abort()
            with pytest.raises(Lost):
                await bodies(stream)
        await nothing_left(proxy)


@pytest.mark.parametrize("target", ["unix:///{}/none.sock", "tcp://127.0.0.1:1"])
async def test_a_target_that_is_not_there(trd_dir, target):
    async with FaultProxy(target.format(trd_dir), f"unix://{trd_dir}/proxy.sock") as proxy, calling() as caller:
        with pytest.raises(ConnectionFailed, match="closed the connection|lost"):
            await caller.call(proxy.address, b"count 1")
        await nothing_left(proxy)


async def test_there_is_no_network_in_memory_to_fail():
    with pytest.raises(ConfigError, match="a proxy needs sockets"):
        FaultProxy("memory://w")


async def test_the_end_of_the_proxy_ends_every_connection_however_new(service):
    """Some are carried, some wait to be accepted: nobody is left waiting, and nothing is left behind."""
    async with contextlib.AsyncExitStack() as stack:
        async with FaultProxy(service.address) as proxy:
            others = [await stack.enter_async_context(peer(proxy.address)) for _ in range(5)]
            await linked(proxy, 5)
            others += [await stack.enter_async_context(peer(proxy.address)) for _ in range(5)]
        for each in others:
            await each.hear()
        assert proxy.connections == 0


async def test_delay(service):
    async with FaultProxy(service.address) as proxy, calling() as caller:
        await caller.pool.connect((proxy.address,))
        proxy.up.delay_s = proxy.down.delay_s = 50 * MS
        loop = asyncio.get_running_loop()
        before = loop.time()
        assert await numbers(await caller.call(proxy.address, b"count 3")) == [0, 1, 2]
        assert loop.time() - before >= 100 * MS - 0.001


async def test_throttle(service):
    async with FaultProxy(service.address) as proxy, calling() as caller:
        await caller.pool.connect((proxy.address,))
        proxy.down.bytes_per_s = 2_000_000 / (1000 * MS)
        loop = asyncio.get_running_loop()
        before = loop.time()
        assert len(await bodies(await caller.call(proxy.address, b"large 4"))) == 4
        assert loop.time() - before >= 190 * MS


@pytest.mark.parametrize("reset", [False, True])
async def test_cut(service, reset):
    async with FaultProxy(service.address) as proxy, calling() as caller:
        stream = await caller.call(proxy.address, b"count 10000000")
        await first(stream)
        proxy.cut(reset=reset)
        with pytest.raises(Lost, match="closed the connection|connection lost" if reset else "closed the connection"):
            await bodies(stream)
        async with asyncio.timeout(PATIENCE_S):
            await service.served[0].ended.wait()
        assert await numbers(await caller.call(proxy.address, b"count 2")) == [0, 1]
        assert len(caller.made) == 2


@pytest.mark.parametrize("reset", [False, True])
async def test_cut_before_the_target_is_reached(service, reset):
    async with FaultProxy(service.address) as proxy, peer(proxy.address) as one:
        await linked(proxy)
        proxy.cut(reset=reset)
        assert await one.hear() == []
        one.writer.close()
        await nothing_left(proxy)
        async with asyncio.timeout(PATIENCE_S):
            for each in service.accepted:  # one where it was reached all the same
                await each.gone.wait()


async def test_black_hole(service):
    async with FaultProxy(service.address) as proxy, calling() as caller, calling(timeout_s=50 * MS) as late:
        stream = await caller.call(proxy.address, b"count 100000")
        await first(stream)
        proxy.black_hole()
        with pytest.raises(ConnectionFailed, match="no answer within"):
            await late.call(proxy.address, b"count 1")
        assert stream.lost is None
        proxy.heal()
        assert (await numbers(stream))[-1] == 99_999
        assert len(caller.made) == 1


@pytest.mark.parametrize("gone", ["client", "service"])
async def test_in_a_black_hole_nobody_learns_that_the_other_end_is_gone(gone):
    async with serving() as service, FaultProxy(service.address) as proxy, calling() as caller:
        stream = await caller.call(proxy.address, b"hold")
        async with asyncio.timeout(PATIENCE_S):
            while not stream.accepted:  # nothing is under way
                await asyncio.sleep(0)
        client, accepted = caller.made[0], service.accepted[0]
        lost, other = (client, accepted) if gone == "client" else (accepted, client)
        proxy.black_hole()
        lost.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOTHING)
        lost.transport.abort()  # a reset
        for _ in range(100):
            await asyncio.sleep(0)
        assert other.lost is None
        assert proxy.connections == 1
        proxy.heal()
        async with asyncio.timeout(PATIENCE_S):
            await other.gone.wait()
        assert stream.lost is not None
        await nothing_left(proxy)


async def test_a_black_hole_holds_what_is_throttled_too(service):
    """More is always on its way, held back for its time, when the hole opens."""
    async with FaultProxy(service.address) as proxy, calling() as caller:
        await caller.pool.connect((proxy.address,))
        proxy.down.bytes_per_s = 64 * 1024 / (20 * MS)
        stream = await caller.call(proxy.address, b"count 100000")
        async with asyncio.timeout(PATIENCE_S):
            while sum(cost for cost, *_ in stream.inbox) < 100_000:
                await stream.next_readable()
        proxy.black_hole()
        for _ in range(50):  # what the kernel had already
            await asyncio.sleep(0)
        before = len(stream.inbox)
        later = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(60 * MS, later.set_result, None)
        await later
        assert len(stream.inbox) == before
        proxy.heal()
        proxy.down.bytes_per_s = None
        assert (await numbers(stream))[-1] == 99_999


async def test_a_black_hole_ends_with_the_proxy(service):
    async with calling() as caller:
        async with FaultProxy(service.address) as proxy:
            stream = await caller.call(proxy.address, b"count 10000000")
            await first(stream)
            proxy.black_hole()
        with pytest.raises(Lost):
            await bodies(stream)


async def test_half_close(service):
    """A session that hears its peer's end has no use for the other half."""
    async with FaultProxy(service.address) as proxy, calling() as caller:
        stream = await caller.call(proxy.address, b"hold")
        async with asyncio.timeout(PATIENCE_S):
            await service.came.wait()
        proxy.half_close()
        with pytest.raises(Lost, match="closed the connection"):
            await bodies(stream)
        async with asyncio.timeout(PATIENCE_S):
            await service.served[0].ended.wait()
        await nothing_left(proxy)


async def test_half_close_carries_the_other_half_on(service):
    async with FaultProxy(service.address) as proxy, peer(proxy.address) as one:
        assert (await one.frame())[0] == f.HELLO
        await one.say(HELLO)
        proxy.half_close()
        await one.hear()


@pytest.mark.parametrize("most", [0, 1, len(HELLO), 5000])
async def test_truncate(service, most):
    async with FaultProxy(service.address) as proxy, calling() as caller:
        proxy.down.truncate_at = most
        with pytest.raises((ConnectionFailed, Lost), match="closed the connection|lost"):
            await bodies(await caller.call(proxy.address, b"count 100000"))
        await nothing_left(proxy)
        proxy.down.truncate_at = None
        assert await numbers(await caller.call(proxy.address, b"count 2")) == [0, 1]


@pytest.mark.parametrize(
    ("at", "says"), [(3, "not this protocol"), (4, "first frame"), (f.HEADER_BYTES, "not a hello")]
)
async def test_corrupt(service, at, says):
    async with FaultProxy(service.address) as proxy, calling() as caller:
        proxy.down.corrupt_at = at
        with pytest.raises(ConnectionFailed, match=says):
            await caller.call(proxy.address, b"count 1")
        proxy.down.corrupt_at = None
        proxy.up.corrupt_at = at
        with pytest.raises((ConnectionFailed, Lost), match=says):
            await bodies(await caller.call(proxy.address, b"count 1"))
        proxy.up.corrupt_at = None
        assert await numbers(await caller.call(proxy.address, b"count 2")) == [0, 1]


# --- what happens to connections that are open already ----------------------------------------------------------------


@contextlib.asynccontextmanager
async def parroted():
    """A proxy in front of a TCP server that sends back what it gets, and a connection through it that has carried 7 bytes."""

    async def parrot(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1000):
                writer.write(data)
        writer.close()

    server = await asyncio.start_server(parrot, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, FaultProxy(f"tcp://127.0.0.1:{port}") as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.address.rpartition(":")[2]))
        writer.write(b"seventh")
        assert await reader.readexactly(7) == b"seventh"
        yield proxy, reader, writer
        writer.close()


async def test_an_open_connection_is_reset_after_so_many_bytes_more():
    async with asyncio.timeout(PATIENCE_S), parroted() as (proxy, reader, writer):
        proxy.truncate_after(5)
        assert proxy.threatened == 1
        writer.write(b"no further")
        with pytest.raises(ConnectionResetError):
            while await reader.read(100):
                pass
            raise AssertionError("an orderly end tells that nothing was lost")
        await nothing_left(proxy)
        assert proxy.threatened == 0


async def test_a_byte_of_an_open_connection_is_turned_once():
    async with asyncio.timeout(PATIENCE_S), parroted() as (proxy, reader, writer):
        proxy.corrupt_after(2)
        (link,) = proxy._links.values()
        link.server.corrupt_at = None  # on its way back it would be turned into what it was
        writer.write(b"aXbYc")
        assert await reader.readexactly(5) == b"aX" + bytes((ord("b") ^ 0xFF,)) + b"Yc"
        assert proxy.threatened == 1  # until it is closed
        writer.write(b"whole")
        assert await reader.readexactly(5) == b"whole"


async def test_what_did_not_happen_yet_is_taken_back():
    async with asyncio.timeout(PATIENCE_S), parroted() as (proxy, reader, writer):
        proxy.truncate_after(3)
        proxy.corrupt_after(1)
        proxy.spare()
        assert proxy.threatened == 0
        writer.write(b"all of it")
        assert await reader.readexactly(9) == b"all of it"
