"""Where sessions come in: how many, and what becomes of those beyond."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from collections.abc import Iterator

import pytest

from tests.timing import PATIENCE_S
from tests.transport.sessions import HELLO, address_of, bodies, calling, closed, numbers, peer, serving
from triton_distributed.errors import ConnectionFailed
from triton_distributed.transport.address import Address
from triton_distributed.wire import frames as f

pytestmark = pytest.mark.any_loop
SCHEMES = ["tcp", "unix", "memory"]


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_one_session_too_many_is_told_why_and_the_others_go_on(trd_dir, scheme):
    async with (
        serving(address_of(scheme, trd_dir), max_sessions=1) as service,
        calling() as first,
        calling() as second,
    ):
        good = await first.call(service.address, b"count 5000")
        for _ in range(3):
            with pytest.raises(ConnectionFailed, match="1 sessions are open here, see TRD_MAX_SESSIONS"):
                await second.call(service.address, b"count 1")
        assert await numbers(good) == [*range(5000)]
        assert len(service.listener.sessions) == 1
        await closed(*second.made)


async def test_a_place_that_is_free_again_is_given_to_the_next():
    async with serving(max_sessions=1) as service, calling() as second:
        async with calling() as first:
            await first.call(service.address, b"hold")
        async with asyncio.timeout(PATIENCE_S):
            await service.accepted[0].gone.wait()
        assert await numbers(await second.call(service.address, b"count 2")) == [0, 1]


async def test_a_refused_peer_is_told_and_closed_even_if_it_says_nothing():
    async with serving(max_sessions=1) as service, peer(service.address) as first:
        assert (await first.frame())[0] == f.HELLO
        await first.say(HELLO, f.frame(f.PING, 0, b"12345678"))
        assert (await first.frame())[0] == f.PONG
        async with peer(service.address) as second:
            kinds = [each[0] for each in await second.hear()]
            assert kinds == [f.HELLO, f.GOAWAY]
        await first.say(f.frame(f.PING, 0, b"again"))
        assert (await first.frame())[0] == f.PONG


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_listening_can_stop_while_sessions_stay(trd_dir, scheme):
    async with serving(address_of(scheme, trd_dir)) as service, calling() as caller, calling() as late:
        stream = await caller.call(service.address, b"echo", end=False)
        service.listener.close_listening()
        with pytest.raises(ConnectionFailed):
            await late.call(service.address, b"count 1")
        await stream.send(b"\x01", ())
        stream.end()
        assert await bodies(stream) == [b"\x01"]


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What was dropped by mistake stays: a collection that happens to come would close it."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
async def test_who_is_being_accepted_when_listening_stops_is_not_left_waiting(trd_dir, scheme, no_collector):
    loop = asyncio.get_running_loop()
    async with serving(address_of(scheme, trd_dir)) as service, contextlib.AsyncExitStack() as stack:
        address = Address.parse(service.address)
        dialling = []
        for _ in range(5):
            sock = stack.enter_context(socket.socket(socket.AF_INET if scheme == "tcp" else socket.AF_UNIX))
            sock.connect((address.host, address.port) if scheme == "tcp" else address.host)
            sock.setblocking(False)
            dialling.append(sock)
        # On asyncio's loop timers come behind sockets in a step: all five are accepted, and none has its session.
        loop.call_later(0, service.listener.close_listening)
        for sock in dialling:
            async with asyncio.timeout(PATIENCE_S):
                with contextlib.suppress(ConnectionError):
                    heard = await loop.sock_recv(sock, 1 << 16)
                    assert heard == b"" or heard[4] == f.HELLO


async def test_closing_ends_every_session():
    async with serving() as service, calling() as caller:
        stream = await caller.call(service.address, b"hold")
        async with asyncio.timeout(PATIENCE_S):
            await service.came.wait()
        service.listener.close()
        async with asyncio.timeout(PATIENCE_S):
            while stream.lost is None:
                await stream.next_readable()
        assert stream.lost == "the peer closed the connection"
        assert not service.listener.sessions


async def test_several_addresses_share_their_sessions_and_their_limit(trd_dir):
    places = [address_of(each, trd_dir) for each in SCHEMES]
    async with serving(*places, "tcp://127.0.0.1:0", max_sessions=3) as service, calling() as caller:
        assert len({*service.addresses}) == 4
        for each in service.addresses[:3]:
            assert await numbers(await caller.call(each, b"count 3")) == [0, 1, 2]
        assert len(service.listener.sessions) == 3
        with pytest.raises(ConnectionFailed, match="3 sessions are open here"):
            await caller.call(service.addresses[3], b"count 1")
        service.listener.close_listening()
        async with calling() as late:
            for each in service.addresses:
                with pytest.raises(ConnectionFailed):
                    await late.call(each, b"count 1")
        assert await numbers(await caller.call(service.addresses[0], b"count 3")) == [0, 1, 2]
