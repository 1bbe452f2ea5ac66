"""What the kernel still holds of a connection that failed.

A write that finds the peer gone ends a transport at once, on asyncio's loop as on uvloop's, while the peer's last words
lie unread in the receive queue: what it accepted, what it answered.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

READ_BYTES = 256 * 1024
# Read at most: a receive queue holds 6 MiB on TCP (tcp_rmem) and what the peer's SO_SNDBUF allows on a Unix socket. A
# peer that takes nothing and goes on sending must not keep the loop.
MOST_BYTES = 64 * 1024 * 1024


class Remainder:
    """Reads what is left, once.

    Args:
        transport: of the connection, which the loop has not closed yet.
    """

    def __init__(self, transport: Any) -> None:
        self._socket = transport.get_extra_info("socket")
        self._ended = False

    def __iter__(self) -> Iterator[bytes]:
        if self._socket is None:
            return
        try:
            for _ in range(MOST_BYTES // READ_BYTES):
                data = os.read(self._socket.fileno(), READ_BYTES)
                if not data:
                    self._ended = True
                    return
                yield data
        except ConnectionResetError:
            # On a Unix socket nothing is ever under way: what was sent stands in the queue, which is empty by now.
            self._ended = self._socket.family == socket.AF_UNIX
        except OSError:  # nothing more for now: the peer is not known to have ended
            return

    def whole(self, error: Exception) -> bool:
        """Whether all that the peer ever sent has arrived, after everything was read.

        Args:
            error: what the transport failed with. A TCP connection that was reset reads like one that has ended, but
                only where the peer's end came before the reset does a write fail with EPIPE (`tcp_reset` in Linux).
        """
        return self._ended and (self._socket.family == socket.AF_UNIX or isinstance(error, BrokenPipeError))
