"""Where sessions come in: how many, and what becomes of those beyond."""

from __future__ import annotations

import asyncio

import pytest

from tests.timing import PATIENCE_S
from tests.transport.sessions import HELLO, address_of, bodies, calling, closed, numbers, peer, serving
from triton_distributed.errors import ConnectionFailed
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
    async with serving(max_sessions=1) as service, peer(service.address) as first, peer(service.address) as second:
        assert (await first.frame())[0] == f.HELLO
        kinds = [each[0] for each in await second.hear()]
        assert kinds == [f.HELLO, f.GOAWAY]
        await first.say(HELLO, f.frame(f.PING, 0, b"12345678"))
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
        assert service.listener.sessions == set()


async def test_what_was_accepted_as_the_listener_closed_is_closed_too():
    async with serving() as service:
        service.listener.close()
        late = service.listener._accept()  # asyncio accepts in one turn, and makes the session in another
        assert late.lost
        assert service.listener.sessions == set()
