"""What the kernel still holds of a connection that failed.

A write that finds the peer gone ends a transport at once, on asyncio's loop as on uvloop's, while the peer's last words
lie unread in the receive queue: what it accepted, what it answered.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from triton_distributed.errors import RemoteProtocolError
from triton_distributed.transport.tls import TlsFailed

if TYPE_CHECKING:
    from triton_distributed.transport.session import Session

logger = logging.getLogger("triton_distributed.transport")

READ_BYTES = 256 * 1024
# Read at most: a receive queue holds 6 MiB on TCP (tcp_rmem) and what the peer's SO_SNDBUF allows on a Unix socket. A
# peer that takes nothing and goes on sending must not keep the loop.
MOST_BYTES = 64 * 1024 * 1024


def read_remainder(session: Session, transport: Any, error: Exception) -> bool:
    """Let a session take what its peer said before its end.

    Args:
        transport: of the session, which the loop has not closed yet.
        error: what it failed with.

    Returns:
        whether all that the peer ever sent has arrived.
    """
    sock = transport.get_extra_info("socket")
    if sock is None:
        # A transport without a socket delivers what came before it tells the end. Where that may not be all that was
        # sent, as when numbered messages are missing, it says so.
        return getattr(transport, "complete", True)
    left = _Left(sock)
    decrypted = getattr(transport, "decrypted", None)
    try:
        for data in left:
            if decrypted is not None:
                data = decrypted(data)
            session.receive(session.copy_direct(data) if session.direct else data)
    except (RemoteProtocolError, TlsFailed) as broken:
        logger.info("session %s: %s", session.address, broken)
        return False
    # A TCP connection that was reset reads like one that has ended, but only where the peer's end came before the
    # reset does a write fail with EPIPE (`tcp_reset` in Linux).
    return left.ended and (sock.family == socket.AF_UNIX or isinstance(error, BrokenPipeError))


class _Left:
    """The bytes in a socket's receive queue; afterwards, whether the peer's end stood behind them."""

    def __init__(self, sock: Any) -> None:
        self._socket = sock
        self.ended = False

    def __iter__(self) -> Iterator[bytes]:
        try:
            for _ in range(MOST_BYTES // READ_BYTES):
                data = os.read(self._socket.fileno(), READ_BYTES)
                if not data:
                    self.ended = True
                    return
                yield data
        except ConnectionResetError:
            # On a Unix socket nothing is ever under way: what was sent stands in the queue, which is empty by now.
            self.ended = self._socket.family == socket.AF_UNIX
        except OSError:  # nothing more for now: the peer is not known to have ended
            return
