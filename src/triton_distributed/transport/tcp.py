"""TCP between hosts."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

BACKLOG = 4096  # connections waiting to be accepted; the kernel caps it at net.core.somaxconn
# Unsent bytes that the kernel holds before the socket stops taking more: above this a token would wait behind an array
# in a queue that nobody can reorder. Linux's TCP_NOTSENT_LOWAT, see tcp(7).
NOT_SENT_LOW_WATER = 256 * 1024


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


def tune(transport: asyncio.BaseTransport) -> None:
    """Options of a connected TCP socket, nothing on others: no delay, keep-alive, a short unsent queue."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):  # an option that a kernel lacks costs speed, not correctness
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOT_SENT_LOW_WATER)
