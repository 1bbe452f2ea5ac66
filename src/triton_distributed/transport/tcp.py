"""TCP between hosts."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import Callable

BACKLOG = 4096  # connections waiting to be accepted; the kernel caps it at net.core.somaxconn
# Unsent bytes that the kernel holds before the socket stops taking more: above this a token would wait behind an array
# in a queue that nobody can reorder. Linux's TCP_NOTSENT_LOWAT, see tcp(7).
NOT_SENT_LOW_WATER = 256 * 1024
# Seconds after which a host that answers nothing is given up: of silence while data is unacknowledged, and on an idle
# connection, where the kernel asks from `IDLE_S` on. The kernel's own are 15 minutes and 2 hours. A process that is
# stopped still has a kernel that answers, but once its buffers are full TCP_USER_TIMEOUT counts against it too, so this
# is above the minute that a process may be paused for. See tcp(7).
SILENCE_S = 90
IDLE_S = 30
PROBE_EVERY_S = 15
OPTIONS = (
    (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
    (socket.IPPROTO_TCP, "TCP_NOTSENT_LOWAT", NOT_SENT_LOW_WATER),
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", IDLE_S),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", PROBE_EVERY_S),
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", (SILENCE_S - IDLE_S) // PROBE_EVERY_S),
    (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", SILENCE_S * 1000),  # milliseconds
)


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


async def listen(
    loop: asyncio.AbstractEventLoop, host: str, port: int, factory: Callable[[], asyncio.Protocol]
) -> asyncio.AbstractServer:
    """Listen on `host` and `port`; `::` is all interfaces, of IPv4 too where one socket can have both.

    Raises:
        OSError: the address cannot be bound.
    """
    if host == "::" and dual_stack():  # asyncio would make it one for IPv6 alone
        sock = _dual_stack_socket(port)
        try:
            return await loop.create_server(factory, sock=sock, backlog=BACKLOG)
        except BaseException:
            sock.close()
            raise
    return await loop.create_server(factory, host, port, backlog=BACKLOG)


def tune(transport: asyncio.BaseTransport) -> None:
    """Options of a connected TCP socket, nothing on others: no delay, `SILENCE_S`, a short unsent queue."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    for level, option, value in OPTIONS:
        if (number := getattr(socket, option, None)) is not None:
            with contextlib.suppress(OSError):  # an option that a kernel lacks costs speed, not correctness
                sock.setsockopt(level, number, value)
