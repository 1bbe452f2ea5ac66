"""A replica's link to its supervisor: it reports that it is ready, and it ends when the supervisor is gone.

A supervisor that another program has started has such a link to that program, and no number.

To use this module, import it: in a replica the import takes over the link. In other processes it only notes the current
directory, in which a supervisor starts the program again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from dataclasses import replace

from triton_distributed.config import Config, variable
from triton_distributed.system.fork import own

READY, WORN, STATUS = "ready", "worn", "status "
"""What a replica reports, one a line: it can be called; it has served as many requests as it should; its status port is
at the URL that follows."""

INDEX, LINK = "TRD_REPLICA", "TRD_SUPERVISOR"
"""The variables of a replica: its number, from 0 on; and the link's descriptor with its inode. A process with an empty
number is no replica: its link only tells when the process that started it has ended."""


def _directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # It was removed.
        return None


directory = _directory()
"""The current directory of the program when it began, before it changed to another."""


class _Link:
    def __init__(self, link: socket.socket) -> None:
        self.pid = os.getpid()
        self.socket = link
        own(link)
        threading.Thread(target=self._watch, name="trd-supervisor", daemon=True).start()

    def _watch(self) -> None:
        """Wait for the end of the supervisor, however it ends, then drain. Runs in its own thread."""
        with contextlib.suppress(OSError):
            while self.socket.recv(64):
                pass
        os.kill(self.pid, signal.SIGTERM)


def named(link: socket.socket) -> str:
    """The value of `LINK` for a process that inherits this socket."""
    return f"{link.fileno()}:{os.fstat(link.fileno()).st_ino}"


def _take() -> _Link | None:
    number, _, inode = variable(LINK).partition(":")
    try:
        # The processes that a replica starts inherit the variable, but not the descriptor.
        if os.fstat(int(number)).st_ino != int(inode):
            return None
        link = socket.socket(fileno=int(number))
    except (OSError, ValueError):
        return None
    link.set_inheritable(False)
    return _Link(link)


_link, _index = _take(), variable(INDEX)


def is_replica() -> bool:
    """Whether a supervisor has started this process."""
    return _link is not None and _link.pid == os.getpid() and _index != ""


def number() -> int | None:
    """The number of this process, if a supervisor has started it."""
    return int(_index) if is_replica() and _index.isdecimal() else None


def settings(config: Config) -> Config:
    """A program's own settings, for this process: their status port is the supervisor's, so a replica takes a free one.

    In its environment the supervisor has done the same.
    """
    if config.status_port > 0 and is_replica():
        return replace(config, status_port=0)
    return config


def report(word: str) -> None:
    """Tell the supervisor, if there is one, how this process is.

    Args:
        word: `READY`, `WORN`, or `STATUS` and a URL.
    """
    if _link is not None and is_replica():
        with contextlib.suppress(OSError):  # The supervisor has ended, so this process drains.
            _link.socket.sendall(f"{word}\n".encode())
