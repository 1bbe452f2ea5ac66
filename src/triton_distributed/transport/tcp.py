"""TCP between hosts."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import socket
import sys
from typing import Any, cast

from triton_distributed.system.protocol import StreamProtocol
from triton_distributed.transport import host_loss

# This many connections may wait to be accepted; the kernel caps this at net.core.somaxconn.
BACKLOG = 4096
# The socket accepts no more while the kernel holds this many unsent bytes (TCP_NOTSENT_LOWAT, see tcp(7)). In a longer
# queue, which cannot be reordered, a token would wait for an array.
NOT_SENT_LOW_WATER = 256 * 1024
OPTIONS = (
    (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
    (socket.IPPROTO_TCP, "TCP_NOTSENT_LOWAT", NOT_SENT_LOW_WATER),
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
)
# Python has no name for these options, of Linux since 6.15 and of macOS (bsd/netinet/tcp.h).
NUMBERS = {
    "linux": {"TCP_RTO_MAX_MS": 44},
    "darwin": {"TCP_RXT_CONNDROPTIME": 0x80, "TCP_KEEPIDLE": 0x10},
}


@functools.cache
def dual_stack() -> bool:
    """Return whether one socket can accept both IPv6 and IPv4."""
    return socket.has_dualstack_ipv6()


def wildcard() -> str:
    """Return the host that means all interfaces: IPv6 and IPv4 if one socket can accept both, else IPv4."""
    if dual_stack():
        with contextlib.suppress(OSError), _dual_stack_socket(0):
            return "::"
    return "0.0.0.0"


def _dual_stack_socket(port: int) -> socket.socket:
    return socket.create_server(("::", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)


async def connect(loop: asyncio.AbstractEventLoop, host: str, port: int, protocol: StreamProtocol) -> None:
    """Connect `protocol` to the worker at `host` and `port`.

    Raises:
        OSError: it cannot be reached.
    """
    await loop.create_connection(lambda: cast(asyncio.Protocol, protocol), host, port)


async def listen(loop: asyncio.AbstractEventLoop, host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen on `host` and `port`, one for each address that the name resolves to.

    `::` means all interfaces, including those of IPv4 if one socket can accept both.

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
    """Set the options of a connected TCP socket: no delay, a short unsent queue, `patience`. Others are left alone."""
    sock = tcp_socket(transport)
    if sock is None:
        return
    for level, number, value in _options(host_timeout_s, OPTIONS, sys.platform):
        with contextlib.suppress(OSError):  # a missing option costs speed, not correctness
            sock.setsockopt(level, number, value)


@functools.lru_cache(maxsize=16)
def _options(
    host_timeout_s: float, others: tuple[tuple[int, str, int], ...], platform: str
) -> tuple[tuple[int, int, int], ...]:
    """Return arguments for `setsockopt`: the options that have a number in Python or in `NUMBERS`."""
    found = []
    for level, option, value in (*others, *patience(host_timeout_s)):
        number = getattr(socket, option, None) or NUMBERS.get(platform, {}).get(option)
        if number is not None:
            found.append((level, number, value))
    return tuple(found)


def tcp_socket(transport: asyncio.BaseTransport) -> Any:
    """Return the socket of a TCP transport; None for other transports."""
    sock = transport.get_extra_info("socket")
    return sock if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6) else None


def patience(host_timeout_s: float) -> list[tuple[int, str, int]]:
    """Return options for how long the kernel waits for a silent host, as (level, option, value); see tcp(7).

    If nothing is under way, the kernel sends keepalive probes and gives up on its own (its defaults take two hours):
    the first probe after a quarter of the timeout, the last at least two thirds of the timeout after the first.

    If data is under way, on Linux `transport.host_loss` reads the kernel's statistics; elsewhere the kernel gives up on
    its own. The kernel retransmits ever more rarely, on Linux up to every two minutes. Before Linux 6.15 it
    may take as long as the outage lasted until a returned network is noticed; since 6.15 TCP_RTO_MAX_MS limits this.

    Args:
        host_timeout_s: seconds after which the connection to an unreachable host is given up.
    """
    idle_s = max(1, int(host_timeout_s / 4))  # the kernel accepts whole seconds
    every_s = max(1, round(host_timeout_s / 12))
    times = [
        ("TCP_KEEPIDLE", idle_s),
        ("TCP_KEEPINTVL", every_s),
        ("TCP_KEEPCNT", min(127, max(1, math.ceil((host_timeout_s - idle_s) / every_s)))),
    ]
    if host_loss.KEPT:
        # More than a tenth of the timeout: the kernel gives up after 15 retransmissions (net.ipv4.tcp_retries2).
        times.append(("TCP_RTO_MAX_MS", round(min(120.0, max(1.0, host_timeout_s / 6)) * 1000)))
    else:
        times.append(("TCP_RXT_CONNDROPTIME", math.ceil(host_timeout_s)))
        times.append(("TCP_USER_TIMEOUT", round(host_timeout_s * 1000)))
    return [(socket.IPPROTO_TCP, option, value) for option, value in times]
