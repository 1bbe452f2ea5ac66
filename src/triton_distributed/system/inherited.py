"""Sockets that a forked child inherits and must not hold."""

from __future__ import annotations

import contextlib
import os
from typing import Any


def give_up(sock: Any) -> None:
    """Let go of an inherited socket without closing its number.

    The number still belongs to objects copied from the parent, which would close it a second time; it now names the
    null device.
    """
    if sock is None:
        return
    with contextlib.suppress(OSError):
        number = sock.fileno()
        if number >= 0:
            null = os.open(os.devnull, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
            os.dup2(null, number, inheritable=False)
            os.close(null)
