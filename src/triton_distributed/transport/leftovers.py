"""Reads the bytes that the kernel still holds after a connection failed.

If a write finds the peer gone, asyncio's and uvloop's transports end at once, while the peer's last frames, such as
ACCEPT and answers, are still unread in the receive queue.
"""

from __future__ import annotations

import os
import socket
from typing import Any

READ_BYTES = 256 * 1024
# At most this many bytes are read: a receive queue holds 6 MiB on TCP (tcp_rmem), and on a Unix socket what the peer's
# SO_SNDBUF allows. A peer that goes on sending must not occupy the loop.
MOST_BYTES = 64 * 1024 * 1024


def read_remainder(transport: Any, error: Exception) -> tuple[list[bytes], bool]:
    """Read the rest of what the peer sent before the connection failed.

    Args:
        transport: the session's transport, which the loop has not closed yet.
        error: the connection's error.

    Returns:
        the pieces, as read from the socket, and whether everything that the peer ever sent has now arrived.
    """
    sock = transport.get_extra_info("socket")
    if sock is None:
        # A transport without a socket delivers all bytes before it reports the end. Its `complete` is False if some
        # may be missing, e.g. numbered messages.
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
        # On a Unix socket nothing is ever under way: all that was sent is in the queue, which is empty by now.
        ended = sock.family == socket.AF_UNIX
    except OSError:
        pass  # no more bytes for now, and the peer may not have ended
    # A TCP connection that was reset reads like one that has ended. But a write fails with EPIPE only if the peer's FIN
    # came before the reset (`tcp_reset` in Linux).
    return pieces, ended and (sock.family == socket.AF_UNIX or isinstance(error, BrokenPipeError))
