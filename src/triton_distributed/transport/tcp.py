"""TCP between hosts."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from typing import Any

BACKLOG = 4096  # connections waiting to be accepted; the kernel caps it at net.core.somaxconn
# Unsent bytes that the kernel holds before the socket stops taking more: above this a token would wait behind an array
# in a queue that nobody can reorder. Linux's TCP_NOTSENT_LOWAT, see tcp(7).
NOT_SENT_LOW_WATER = 256 * 1024
KEEPALIVE_PROBES = 3  # after twice their interval without a byte
# Probes into a full window that nobody answered: a host that is there leaves out two at most, for it answers the first
# quick ones but twice a second (net.ipv4.tcp_invalid_ratelimit).
MOST_PROBES = 4
# Of Linux's struct tcp_info: tcpi_retransmits, tcpi_probes; tcpi_unacked; tcpi_last_data_sent; tcpi_last_data_recv,
# tcpi_last_ack_recv.
_INFO = struct.Struct("=2xBB20xI16xI4xII")


async def connect(loop: asyncio.AbstractEventLoop, host: str, port: int, protocol: asyncio.Protocol) -> None:
    """Join `protocol` to the worker that listens there.

    Raises:
        OSError: it cannot be reached.
    """
    await loop.create_connection(lambda: protocol, host, port)


async def listen(
    loop: asyncio.AbstractEventLoop, host: str, port: int, factory: Callable[[], asyncio.Protocol]
) -> asyncio.AbstractServer:
    """Listen on `host` and `port`.

    Raises:
        OSError: the address cannot be bound.
    """
    return await loop.create_server(factory, host, port, backlog=BACKLOG)


def _tcp_socket(transport: asyncio.BaseTransport) -> Any:
    sock = transport.get_extra_info("socket")
    return sock if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6) else None


def tune(transport: asyncio.BaseTransport, health_timeout_s: float) -> None:
    """Options of a connected TCP socket, nothing on others: no delay, keep-alive, a short unsent queue.

    Args:
        health_timeout_s: seconds after which a connection with nothing under way is lost where the host is gone.
    """
    sock = _tcp_socket(transport)
    if sock is None:
        return
    with contextlib.suppress(OSError):  # an option that a kernel lacks costs speed, not correctness
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOT_SENT_LOW_WATER)
        if hasattr(socket, "TCP_KEEPIDLE"):
            probe_s = max(1, int(health_timeout_s / (2 + KEEPALIVE_PROBES)))  # whole seconds are what the kernel takes
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2 * probe_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def unacknowledged(transport: asyncio.BaseTransport, timeout_s: float) -> bool:
    """Whether the peer's host has acknowledged nothing for so long although it had to. False where that is not known.

    Keep-alive rests while bytes are under way, and the kernel repeats those for a quarter of an hour. TCP_USER_TIMEOUT
    would end that earlier, but a connection to a stopped process, whose host acknowledges and whose window is full,
    too: measured with Linux 6.18. So the kernel is asked.
    """
    sock = _tcp_socket(transport)
    if sock is None or not hasattr(socket, "TCP_INFO"):
        return False
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
    except OSError:
        return False
    if len(info) < _INFO.size:  # an older kernel knows less
        return False
    retransmits, probes, unacked, sent_ms, received_ms, acknowledged_ms = _INFO.unpack(info)
    return gone(retransmits, probes, unacked, sent_ms, received_ms, acknowledged_ms, timeout_s * 1000)


def gone(
    retransmits: int, probes: int, unacked: int, sent_ms: int, received_ms: int, acknowledged_ms: int, timeout_ms: float
) -> bool:
    """What the kernel knows of a connection, as a judgement on its peer's host.

    Args:
        retransmits: how often the first of what is under way was sent again.
        probes: into a full window, since one was answered.
        unacked: segments under way.
        sent_ms, received_ms, acknowledged_ms: milliseconds since data were sent, and data and an acknowledgement came.
        timeout_ms: how long it may be silent.
    """
    silent_ms = min(received_ms, acknowledged_ms)
    if silent_ms < timeout_ms:
        return False
    # The latest of what was sent has had its time too: a host that is asked ever more rarely answers as rarely.
    unanswered = unacked > 0 and retransmits > 0 and timeout_ms / 4 <= sent_ms < silent_ms
    return unanswered or probes >= MOST_PROBES
