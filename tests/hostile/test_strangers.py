"""Connections that never become members: they take no place from those that do."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import itertools
import logging
import socket

import pytest

from tests.runtime.cluster import until
from tests.timing import PATIENCE_S
from tests.transport.sessions import HELLO, Service, calling, closed, numbers, peer, serving, session
from triton_distributed.transport import acceptor
from triton_distributed.transport.acceptor import DESCRIPTORS_KEPT, MOST_A_TURN, Acceptor
from triton_distributed.transport.listener import Listener
from triton_distributed.wire import frames as f

pytestmark = pytest.mark.any_loop


@pytest.fixture
def few_greeting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener that lets five connections be without their hello."""
    monkeypatch.setattr(Listener.__init__, "__defaults__", (None, None, 5))


def have_come(service: Service, number: int) -> bool:
    return len(service.accepted) == number


async def test_of_silent_connections_the_oldest_gives_way(few_greeting, caplog):
    with caplog.at_level(logging.WARNING, "triton_distributed.transport"):
        async with serving() as service, calling() as good, contextlib.AsyncExitStack() as stack:
            silent = []
            for number in range(20):
                silent.append(await stack.enter_async_context(peer(service.address)))
                await until(functools.partial(have_come, service, number + 1))
            assert await numbers(await good.call(service.address, b"count 3")) == [0, 1, 2]
            words = await asyncio.gather(*[each.dismissal() for each in silent[:15]])
            assert set(words) == {"5 connections here have not sent a hello, see TRD_MAX_GREETING"}
            await silent[-1].say(HELLO, f.frame(f.PING, 0, b"me too"))
            while (await silent[-1].frame())[3] != b"me too":
                pass
            assert len(service.listener.sessions) <= 6
    assert len(caplog.records) == 1


async def test_who_has_said_hello_does_not_give_way(few_greeting):
    async with serving() as service, calling() as good, contextlib.AsyncExitStack() as stack:
        stream = await good.call(service.address, b"count 100000")
        for _ in range(20):
            await stack.enter_async_context(peer(service.address))
        assert await numbers(stream) == [*range(100_000)]
        assert len(good.made) == 1


async def test_silent_connections_take_no_sessions_place():
    async with serving(max_sessions=3) as service, calling() as good, contextlib.AsyncExitStack() as stack:
        silent = [await stack.enter_async_context(peer(service.address)) for _ in range(3)]
        await until(lambda: len(service.accepted) == 3)
        assert await numbers(await good.call(service.address, b"count 3")) == [0, 1, 2]
        assert await silent[0].dismissal() == "3 sessions are open here, see TRD_MAX_SESSIONS"


async def test_where_descriptors_are_few_silent_ones_give_way_and_members_stay(monkeypatch):
    async with serving() as service, calling() as good, peer(service.address) as silent:
        stream = await good.call(service.address, b"echo", end=False)
        monkeypatch.setattr(acceptor, "most_descriptors", lambda: DESCRIPTORS_KEPT)
        async with calling() as late:
            assert await numbers(await late.call(service.address, b"count 3")) == [0, 1, 2]
            assert "few descriptors are left, see `ulimit -n`" in await silent.dismissal()
            async with peer(service.address) as beyond:  # nobody is left who could give way
                assert "few descriptors are left, see `ulimit -n`" in await beyond.dismissal()
        stream.end()
        assert await numbers(stream) == []


class Poor(socket.socket):
    """A listening socket for whose connections there is no descriptor, so often."""

    failures = 3

    def accept(self):
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


async def test_without_descriptors_accepting_pauses_and_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(acceptor, "PAUSE_S", 0.001)
    loop = asyncio.get_running_loop()
    sock = Poor()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    asked, made = [], []

    def accept(few: bool):
        made.append(session(lambda *request: None))
        return made[-1]

    accepting = Acceptor(loop, sock, accept, lambda: asked.append(sock.failures))
    with caplog.at_level(logging.WARNING, "triton_distributed.transport"):
        async with peer(f"tcp://127.0.0.1:{sock.getsockname()[1]}") as waits:
            assert (await waits.frame())[0] == f.HELLO
    assert asked == [2, 1, 0]
    assert [each.getMessage() for each in caplog.records] == [
        "cannot accept connections: [Errno 24] Too many open files; see `ulimit -n` and TRD_MAX_SESSIONS"
    ]
    accepting.close()
    await closed(*made)


async def test_a_crowd_is_accepted_a_few_a_turn():
    async with serving() as service, contextlib.AsyncExitStack() as stack:
        port = int(service.address.rpartition(":")[2])
        for _ in range(40):  # the kernel takes them all before the loop turns
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        seen = [0]
        async with asyncio.timeout(PATIENCE_S):
            while len(service.accepted) < 40:
                await asyncio.sleep(0)
                seen.append(len(service.accepted))
        assert max(after - before for before, after in itertools.pairwise(seen)) <= MOST_A_TURN
