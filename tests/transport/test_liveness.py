"""Peers that say nothing: stopped processes keep their streams, hosts that are gone lose them."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from tests.timing import MS, PATIENCE_S
from tests.transport.sessions import HELLO, Peer, address_of, answering, bodies, calling, numbers, serving, until
from triton_distributed.errors import ConnectionFailed
from triton_distributed.transport.liveness import CHECKS, Liveness
from triton_distributed.wire import frames as f
from triton_distributed.wire.frames import GoawayCode


class Timer:
    """What `call_later` returns."""

    def __init__(self, loop, when, call):
        self.loop, self._when, self.call = loop, when, call

    def when(self):
        return self._when

    def cancel(self):
        self.loop.timers.remove(self)


class Clock:
    """A loop whose time a test moves."""

    def __init__(self):
        self.now = 0.0
        self.timers: list[Timer] = []

    def time(self):
        return self.now

    def call_later(self, delay, call):
        self.timers.append(Timer(self, self.now + delay, call))
        return self.timers[-1]

    def pass_time(self, seconds, late=0.0):
        """Let so much time pass; each timer is called so much too late."""
        end = self.now + seconds
        while self.timers and min(each.when() for each in self.timers) <= end:
            timer = min(self.timers, key=Timer.when)
            self.timers.remove(timer)
            self.now = timer.when() + late
            timer.call()
        self.now = max(self.now, end)


class Told:
    """A session as `Liveness` sees it."""

    def __init__(self, *, streams=True, gone=False):
        self.streams, self.gone = streams, gone
        self.heard, self.missed_checks = False, -1
        self.pings = self.judged = 0
        self.abandoned = ""

    def host_gone(self, timeout_s):
        assert timeout_s == 30.0
        self.judged += 1
        return self.gone

    def abandon(self, words):
        self.abandoned = words

    def ping(self):
        self.pings += 1


def watched(*sessions, asks=True, health_s=10.0, host_s=30.0):
    clock: Any = Clock()
    silent: list[Told] = []
    found = list(sessions)
    liveness = Liveness(clock, lambda: found, health_s, host_s, silent.append if asks else None)
    liveness.start()
    return SimpleNamespace(clock=clock, silent=silent, sessions=found, liveness=liveness)


def test_one_that_is_waited_for_is_asked_and_reported_within_the_timeout():
    one = Told()
    all_ = watched(one)
    all_.clock.pass_time(7.4)
    assert one.pings == 1
    assert all_.silent == []
    all_.clock.pass_time(2.6)
    assert all_.silent == [one]
    all_.clock.pass_time(1000)
    assert all_.silent == [one]  # once
    one.heard = True
    all_.clock.pass_time(2.5)
    all_.clock.pass_time(10)
    assert all_.silent == [one, one]


def test_one_that_says_something_now_and_then_is_never_reported():
    one = Told()
    all_ = watched(one)
    for _ in range(100):
        one.heard = True
        all_.clock.pass_time(7.4)
    assert all_.silent == []


def test_one_where_nothing_is_waited_for_is_left_alone():
    one = Told(streams=False)
    all_ = watched(one)
    all_.clock.pass_time(1000)
    assert (one.pings, all_.silent) == (0, [])
    one.streams = True  # only now, so its silence until now says nothing
    all_.clock.pass_time(7.4)
    assert all_.silent == []
    all_.clock.pass_time(2.6)
    assert all_.silent == [one]


def test_a_loop_that_was_blocked_itself_blames_nobody():
    one = Told()
    all_ = watched(one)
    all_.clock.pass_time(100, late=1.3)
    assert (one.pings, all_.silent) == (0, [])
    all_.clock.pass_time(15)
    assert all_.silent == [one]


@pytest.mark.parametrize("asks", [True, False])
def test_a_host_that_is_gone_loses_its_sessions_after_its_timeout(asks):
    one, other, idle, said = Told(gone=True), Told(), Told(gone=True, streams=False), Told(gone=True)
    all_ = watched(one, other, idle, said, asks=asks)
    for _ in range(11):
        said.heard = True
        all_.clock.pass_time(2.5)
    assert not any(each.judged for each in all_.sessions)
    all_.clock.pass_time(5.0)
    for each in (one, idle):
        assert each.abandoned == "its host acknowledged nothing for 30 s, see TRD_HOST_TIMEOUT_S"
    assert not other.abandoned
    assert not said.judged
    assert bool(other.pings) == asks
    assert all_.silent == ([one, other] if asks else [])


def test_a_host_timeout_below_that_of_health_counts_as_that():
    one = Told(gone=True)
    all_ = watched(one, health_s=30.0, host_s=5.0)
    all_.clock.pass_time(29)
    assert not one.abandoned
    all_.clock.pass_time(15)
    assert "for 30 s" in one.abandoned


def test_one_where_nothing_is_waited_for_costs_one_look_at_the_kernel_in_the_timeout():
    one = Told(streams=False)
    all_ = watched(one)
    all_.clock.pass_time(300)
    assert 8 <= one.judged <= 10


def test_one_timer_while_there_are_sessions():
    one = Told()
    all_ = watched(one, Told(streams=False), Told())
    all_.liveness.start()
    for _ in range(3 * CHECKS):
        assert len(all_.clock.timers) == 1
        all_.clock.pass_time(2.5)
    all_.sessions.clear()
    all_.clock.pass_time(2.5)
    assert all_.clock.timers == []
    all_.liveness.start()
    all_.liveness.stop()
    all_.liveness.stop()
    assert all_.clock.timers == []


# --- with real sessions ----------------------------------------------------------------------------------------------


def look(liveness: Liveness[Any]) -> None:
    """Let it look now."""
    assert liveness._timer is not None
    liveness._timer.cancel()
    liveness._check()


async def answered(made) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await made.ping()


@pytest.mark.any_loop
@pytest.mark.parametrize("scheme", ["tcp", "unix", "memory"])
async def test_a_handler_that_takes_its_time_is_not_silent(scheme, trd_dir):
    async with serving(address_of(scheme, trd_dir)) as service, calling() as caller:
        stream = await caller.call(service.address, b"hold")
        for _ in range(3 * CHECKS):
            look(caller.pool._liveness)
            await answered(caller.made[0])
        assert caller.lost == []
        assert stream.lost is None


@pytest.mark.any_loop
async def test_a_silent_worker_is_reported_and_keeps_its_streams():
    go = asyncio.Event()
    heard: list[int] = []

    async def worker(peer: Peer) -> None:
        await peer.say(HELLO)
        await go.wait()
        while True:
            heard.append((await peer.frame())[0])
            if heard[-1] == f.PING:
                await peer.say(f.frame(f.PONG, 0), f.frame(f.DATA, 1, b"\x01", f.END))
                await peer.hear()
                return

    async with calling() as caller, answering(worker) as address:
        stream = await caller.call(address, b"x")
        for _ in range(3 * CHECKS):
            look(caller.pool._liveness)
            await asyncio.sleep(0)
        ((addresses, words),) = caller.lost
        assert addresses == (address,)
        assert "nothing was heard for" in words
        assert "TRD_HEALTH_TIMEOUT_S" in words
        session = caller.pool.get((address,))
        assert session is not None
        assert session.usable
        assert stream.lost is None
        go.set()
        assert await numbers(stream) == [1]
        assert heard == [f.HELLO, f.REQUEST, f.PING]  # one under way at a time


@pytest.mark.any_loop
async def test_a_large_message_that_comes_slowly_is_a_sign_of_life():
    async def worker(peer: Peer) -> None:
        await peer.say(HELLO)
        while (await peer.frame())[0] != f.REQUEST:
            pass
        await peer.say(f.frame(f.DATA, 1, f.UINT64.pack(100_000) + bytes(100), f.MORE))
        await peer.say(f.HEADER.pack(99_900, f.DATA, f.END, 1))
        for _ in range(99):
            await turn.wait()
            turn.clear()
            await peer.say(bytes(900))
        await peer.say(bytes(99_900 - 99 * 900))
        await peer.hear()

    turn = asyncio.Event()
    async with calling() as caller, answering(worker) as address:
        session = await caller.pool.connect((address,))
        stream = session.connection.open_stream(True)
        session.connection.send(f.frame(f.REQUEST, 1, f.REQUEST_PREFIX.pack(1, 2, 1e9, stream.window, 0), f.END))
        await until(lambda: session.connection.direct)
        for _ in range(99):
            session.heard = False
            turn.set()
            await until(lambda: session.heard)
            look(caller.pool._liveness)
        assert caller.lost == []
        assert await bodies(stream) == [bytes(100_000)]


@pytest.mark.any_loop
async def test_a_probe_of_a_live_session_wants_an_answer():
    async def worker(peer: Peer) -> None:
        await peer.say(HELLO)
        with contextlib.suppress(EOFError):
            while True:
                if (await peer.frame())[0] == f.PING and wakes.is_set():
                    await peer.say(f.frame(f.PONG, 0))

    wakes = asyncio.Event()
    wakes.set()
    async with calling(timeout_s=100 * MS) as caller, answering(worker) as address:
        await caller.pool.probe((address,))  # dials
        await caller.pool.probe((address,))  # asks
        wakes.clear()
        with pytest.raises(ConnectionFailed, match=r"no answer to a PING within 0\.1 s"):
            await caller.pool.probe((address,))
        assert len(caller.made) == 1
        probing = asyncio.ensure_future(caller.pool.probe((address,)))
        await asyncio.sleep(0)
        caller.made[0].transport.abort()
        with pytest.raises(ConnectionFailed, match="closed the connection"):
            await probing


@pytest.mark.any_loop
async def test_a_worker_that_drains_does_not_pass_a_probe():
    async with serving() as service, calling() as caller:
        made = await caller.pool.connect((service.address,))
        service.accepted[0].go_away(GoawayCode.DRAINING, "bye")
        with pytest.raises(ConnectionFailed, match="bye"):
            await caller.pool.probe((service.address,))
        assert made.connection.going is not None


@pytest.mark.any_loop
async def test_a_session_that_is_gone_answers_at_once():
    async with serving() as service, calling() as caller:
        made = await caller.pool.connect((service.address,))
        made.close()
        await answered(made)
