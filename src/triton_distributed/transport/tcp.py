"""TCP between hosts."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import socket
import sys
from typing import Any

from triton_distributed.transport import host_loss

# This many connections may wait to be accepted; the kernel caps this at net.core.somaxconn.
BACKLOG = 4096
# The socket takes no more while the kernel holds this many unsent bytes. Beyond this a token would wait after an array
# in a queue that cannot be reordered. It is Linux's TCP_NOTSENT_LOWAT, see tcp(7).
NOT_SENT_LOW_WATER = 256 * 1024
OPTIONS = (
    (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
    (socket.IPPROTO_TCP, "TCP_NOTSENT_LOWAT", NOT_SENT_LOW_WATER),
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
)
# Python has no name for these options of Linux from 6.15 on, and of macOS (bsd/netinet/tcp.h).
NUMBERS = {
    "linux": {"TCP_RTO_MAX_MS": 44},
    "darwin": {"TCP_RXT_CONNDROPTIME": 0x80, "TCP_KEEPIDLE": 0x10},
}


@functools.cache
def dual_stack() -> bool:
    """Whether one socket takes both IPv6 and IPv4."""
    return socket.has_dualstack_ipv6()


def wildcard() -> str:
    """The host that means all interfaces: IPv6 and IPv4 where one socket can have both, else IPv4."""
    if dual_stack():
        with contextlib.suppress(OSError), _dual_stack_socket(0):
            return "::"
    return "0.0.0.0"


def _dual_stack_socket(port: int) -> socket.socket:
    return socket.create_server(("::", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)


async def connect(loop: asyncio.AbstractEventLoop, host: str, port: int, protocol: asyncio.Protocol) -> None:
    """Join `protocol` to the worker that listens there.

    Raises:
        OSError: it cannot be reached.
    """
    await loop.create_connection(lambda: protocol, host, port)


async def listen(loop: asyncio.AbstractEventLoop, host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on `host` and `port`, one for each address that a name stands for.

    `::` is all interfaces, of IPv4 too where one socket can have both.

    Raises:
        OSError: the address cannot be bound.
    """
    if host == "::" and dual_stack():
        return [_dual_stack_socket(port)]
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    socks: list[socket.socket] = []
    try:
        for family, address in dict.fromkeys((each[0], each[4]) for each in found):
            socks.append(socket.create_server(address, family=family, backlog=BACKLOG))
    except BaseException:
        for sock in socks:
            sock.close()
        raise
    return socks


def tune(transport: asyncio.BaseTransport, host_timeout_s: float) -> None:
    """Options of a connected TCP socket, nothing on others: no delay, a short unsent queue, `patience`."""
    sock = tcp_socket(transport)
    if sock is None:
        return
    for level, number, value in _options(host_timeout_s, OPTIONS, sys.platform):
        with contextlib.suppress(OSError):  # an option that a kernel lacks costs speed, not correctness
            sock.setsockopt(level, number, value)


@functools.lru_cache(maxsize=16)
def _options(
    host_timeout_s: float, others: tuple[tuple[int, str, int], ...], platform: str
) -> tuple[tuple[int, int, int], ...]:
    """What `setsockopt` takes: those options that Python, or `NUMBERS`, has a number for."""
    found = []
    for level, option, value in (*others, *patience(host_timeout_s)):
        number = getattr(socket, option, None) or NUMBERS.get(platform, {}).get(option)
        if number is not None:
            found.append((level, number, value))
    return tuple(found)


def tcp_socket(transport: asyncio.BaseTransport) -> Any:
    """The socket of a TCP transport, None of others."""
    sock = transport.get_extra_info("socket")
    return sock if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6) else None


def patience(host_timeout_s: float) -> list[tuple[int, str, int]]:
    """How long the kernel waits for a host that says nothing, as (level, option, value) each; see tcp(7).

    Where nothing is under way the kernel asks, and gives up by itself (its own defaults take two hours): the first
    question after a quarter of the timeout, the last two thirds of the timeout or more after the first.

    Where something is under way `transport.host_loss` asks the kernel. That is Linux's account; elsewhere the kernel
    gives up by itself. It sends again ever more rarely, on Linux up to every two minutes: before 6.15 a network that
    comes back is noticed as much later as it was away, from then on as this says.

    Args:
        host_timeout_s: seconds after which a host that is gone is given up.
    """
    idle_s = max(1, int(host_timeout_s / 4))  # the kernel takes whole seconds
    every_s = max(1, round(host_timeout_s / 12))
    times = [
        ("TCP_KEEPIDLE", idle_s),
        ("TCP_KEEPINTVL", every_s),
        ("TCP_KEEPCNT", min(127, max(1, math.ceil((host_timeout_s - idle_s) / every_s)))),
    ]
    if host_loss.KEPT:
        # Above a tenth of the timeout, for the kernel gives up by itself after 15 of them (net.ipv4.tcp_retries2).
        times.append(("TCP_RTO_MAX_MS", round(min(120.0, max(1.0, host_timeout_s / 6)) * 1000)))
    else:
        times.append(("TCP_RXT_CONNDROPTIME", math.ceil(host_timeout_s)))
        times.append(("TCP_USER_TIMEOUT", round(host_timeout_s * 1000)))
    return [(socket.IPPROTO_TCP, option, value) for option, value in times]
