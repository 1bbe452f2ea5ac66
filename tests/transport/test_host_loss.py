"""Hosts that are host_loss, told from processes that are stopped: by the kernel's account, and with real connections."""

from __future__ import annotations

import asyncio
import ctypes
import socket
import struct
from typing import Any

import pytest

from tests.timing import MS
from tests.transport.sessions import HELLO, Peer, answering, calling, numbers, serving, until
from triton_distributed.transport import host_loss
from triton_distributed.transport.host_loss import Account
from triton_distributed.transport.liveness import CHECKS
from triton_distributed.wire import frames as f

SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27  # of asm-generic/socket.h; see socket(7)
# Shorter ones leave TCP no time to send again: its first two repetitions come after 200 and 600 ms, see tcp(7).
HOST_S = 1500 * MS
HEALTH_S = 200 * MS

needs_account = pytest.mark.skipif(not host_loss.KEPT, reason="only Linux keeps this account of a connection")


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        pytest.param(Account(0, 0, 0, 50_000, 50_000, 4_000), False, id="idle, kept alive"),
        pytest.param(Account(0, 0, 1, 0, 50_000, 50_000), False, id="sent this moment after a long silence"),
        pytest.param(Account(1, 0, 1, 100, 50_000, 50_000), False, id="sent again a moment ago"),
        pytest.param(Account(7, 0, 2, 2_600, 29_000, 29_000), False, id="not for long enough"),
        pytest.param(Account(8, 0, 2, 3_900, 30_300, 30_200), True, id="sent again and again"),
        pytest.param(Account(7, 0, 2, 10_100, 30_300, 30_200), False, id="not asked since a cut of 20 s may be over"),
        pytest.param(Account(8, 0, 2, 3_900, 50, 30_200), False, id="it is heard, and acknowledges nothing"),
        pytest.param(Account(0, 1, 0, 40_000, 40_000, 35_000), False, id="full window, asked rarely and answered"),
        pytest.param(Account(0, 2, 0, 1_000, 1_000, 900), False, id="full window, the first quick probes"),
        pytest.param(Account(7, 0, 9, 50_000, 60_000, 50_000), False, id="full window, asked by data and answered"),
        pytest.param(Account(0, 6, 0, 40_000, 40_000, 35_000), True, id="full window, and nobody answers"),
    ],
)
def test_which_hosts_are_gone(known: Account, expected: bool) -> None:
    assert host_loss.gone(known, 30.0) is expected


def vanish(session: Any) -> None:
    """Let the kernel drop whatever comes for this socket, as if its host were gone."""
    code = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF: return 0 bytes
    program = struct.pack("HL", 1, ctypes.addressof(code))
    session._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def reappear(session: Any) -> None:
    session._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)


def streams(session: Any) -> int:
    return len(session.streams)


@needs_account
@pytest.mark.any_loop
async def test_a_worker_whose_host_is_gone_is_lost() -> None:
    async with (
        serving(host_timeout_s=60) as service,
        calling(health_timeout_s=HEALTH_S, host_timeout_s=HOST_S) as caller,
    ):
        stream = await caller.call(service.address, b"hold")
        await until(lambda: service.running)
        vanish(service.accepted[0])
        await until(lambda: stream.lost)
        assert stream.lost == f"its host acknowledged nothing for {HOST_S:g} s, see TRD_HOST_TIMEOUT_S"
        assert caller.made[0].possibly_incomplete
        assert caller.pool.get((service.address,)) is None
        # It was silent first, and stayed.
        assert [("nothing was heard" in words, "acknowledged nothing" in words) for _, words in caller.lost] == [
            (True, False),
            (False, True),
        ]


@needs_account
@pytest.mark.any_loop
async def test_a_client_whose_host_is_gone_is_lost_and_its_handler_is_cancelled() -> None:
    async with (
        serving(health_timeout_s=HEALTH_S, host_timeout_s=HOST_S) as service,
        calling(host_timeout_s=60) as caller,
    ):
        await caller.call(service.address, b"hold")
        await until(lambda: service.running)
        vanish(caller.made[0])
        next(iter(service.running)).stream.push(b"\x01")
        await until(lambda: service.accepted[0].lost)
        assert service.lost == [f"its host acknowledged nothing for {HOST_S:g} s, see TRD_HOST_TIMEOUT_S"]
        await until(lambda: not service.running)


@needs_account
@pytest.mark.any_loop
async def test_what_was_sent_last_is_not_waited_for_when_no_stream_is_left() -> None:
    """A client that vanishes behind its last answer must not keep its place among TRD_MAX_SESSIONS."""
    async with (
        serving(health_timeout_s=HEALTH_S, host_timeout_s=HOST_S) as service,
        calling(host_timeout_s=60) as caller,
    ):
        await caller.call(service.address, b"hold")
        await until(lambda: service.running)
        vanish(caller.made[0])
        next(iter(service.running)).stream.end()
        await until(lambda: not service.accepted[0].streams)
        await until(lambda: service.accepted[0].lost)
        await until(lambda: not service.listener.sessions)


@needs_account
@pytest.mark.any_loop
async def test_a_network_that_comes_back_costs_nothing() -> None:
    async with (
        serving(host_timeout_s=60) as service,
        calling(health_timeout_s=HEALTH_S, host_timeout_s=HOST_S) as caller,
    ):
        stream = await caller.call(service.address, b"hold")
        await until(lambda: service.running)
        vanish(service.accepted[0])
        await until(lambda: caller.lost)  # silent
        reappear(service.accepted[0])
        serving_ = next(iter(service.running))
        serving_.stream.push(b"\x01")
        serving_.stream.end()
        assert await numbers(stream) == [1]
        session = caller.made[0]
        await until(lambda: session.heard or not session.missed_checks)
        assert session.usable


@needs_account
@pytest.mark.any_loop
async def test_a_stopped_worker_whose_window_is_full_keeps_its_session() -> None:
    """TCP_USER_TIMEOUT would end it."""

    async def worker(peer: Peer) -> None:
        await peer.say(HELLO)
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await go.wait()
        peer.writer.transport.resume_reading()  # type: ignore[attr-defined]
        size = 0
        while size < 8_000_000:
            size += len(await peer.reader.read(1 << 20))
        await peer.say(f.frame(f.DATA, 1, b"\x01", f.END))
        await peer.hear()

    go = asyncio.Event()
    async with calling(health_timeout_s=HEALTH_S, host_timeout_s=HOST_S) as caller, answering(worker) as address:
        session = await caller.pool.connect((address,))
        stream = session.connection.open_stream(True)
        stream.credit = 1 << 30
        session.connection.send(f.frame(f.REQUEST, 1, f.REQUEST_PREFIX.pack(1, 2, 1e9, stream.window, 0), f.END))
        for _ in range(8):  # ends its requests, and goes on writing all the same: only the bytes matter
            session.write_after(b"", memoryview(bytes(1_000_000)))
        await until(lambda: caller.lost)
        looks = session.missed_checks + 3 * CHECKS * round(HOST_S / HEALTH_S)
        await until(lambda: session.missed_checks >= looks)
        assert len(caller.lost) == 1
        assert session.usable
        go.set()
        assert await numbers(stream) == [1]
