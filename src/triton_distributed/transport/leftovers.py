"""What the kernel still holds of a connection that failed.

A write that finds the peer gone ends a transport at once, on asyncio's loop as on uvloop's, while the peer's last words
lie unread in the receive queue: what it accepted, what it answered.
"""

from __future__ import annotations

import os
import socket
from typing import Any

READ_BYTES = 256 * 1024
# At most this much is read: a receive queue holds 6 MiB on TCP (tcp_rmem), and on a Unix socket what the peer's
# SO_SNDBUF allows. A peer that takes nothing and goes on sending must not keep the loop.
MOST_BYTES = 64 * 1024 * 1024


def read_remainder(transport: Any, error: Exception) -> tuple[list[bytes], bool]:
    """What the peer said before its end and was not read.

    Args:
        transport: of the session, which the loop has not closed yet.
        error: what it failed with.

    Returns:
        the pieces, as they came from the socket, and whether with them all that the peer ever sent has arrived.
    """
    sock = transport.get_extra_info("socket")
    if sock is None:
        # A transport without a socket delivers what came before it tells the end. Where that may not be all that was
        # sent, as when numbered messages are missing, it says so.
        return [], getattr(transport, "complete", True)
    pieces: list[bytes] = []
    ended = False
    try:
        while len(pieces) < MOST_BYTES // READ_BYTES:
            data = os.read(sock.fileno(), READ_BYTES)
            if not data:
                ended = True
                break
            pieces.append(data)
    except ConnectionResetError:
        # On a Unix socket nothing is ever under way: what was sent is in the queue, which is empty by now.
        ended = sock.family == socket.AF_UNIX
    except OSError:
        pass  # nothing more for now: the peer is not known to have ended
    # A TCP connection that was reset reads like one that has ended, but only where the peer's end came before the
    # reset does a write fail with EPIPE (`tcp_reset` in Linux).
    return pieces, ended and (sock.family == socket.AF_UNIX or isinstance(error, BrokenPipeError))
