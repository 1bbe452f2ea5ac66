"""Forks: a child gives up the descriptors that it inherited, and its copies of runtimes are unusable and say so.

A child that kept a copy of a socket would keep the connection open after its parent has died, and the peer would not
see the death. So each descriptor has an entry here, and one hook gives up all of them in a child. What holds more than
descriptors, such as a runtime, is notified.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import weakref
from typing import Any, Protocol


class Forkable(Protocol):
    """Something that must know that this process is a fork of the one that made it."""

    def forked(self) -> None: ...


# Hooks that are registered with the interpreter cannot be removed, so there is one, and it finds what is alive.
_owned: weakref.WeakSet[Any] = weakref.WeakSet()
_notified: weakref.WeakSet[Forkable] = weakref.WeakSet()

no_fork = threading.RLock()
"""Held from opening a descriptor until `own`, where another thread may fork meanwhile. A finaliser may fork as well."""


def own(holder: Any) -> None:
    """Give up a descriptor in every child that is forked while its holder lives.

    Args:
        holder: a socket, an asyncio transport, or anything else with a `fileno()`, which is -1 where there is none.
    """
    _owned.add(holder)


def watch_forks(each: Forkable) -> None:
    """Call `each.forked()` in every child that is forked while it lives, when all descriptors are given up."""
    _notified.add(each)


def _give_up(holder: Any) -> None:
    """Let go of an inherited descriptor without closing its number.

    The number still belongs to objects copied from the parent, which would close it a second time. From now on it names
    the null device.
    """
    with contextlib.suppress(OSError, ValueError):  # it was closed
        sock = holder.get_extra_info("socket") if hasattr(holder, "get_extra_info") else holder
        number = -1 if sock is None else sock.fileno()
        if number >= 0:
            null = os.open(os.devnull, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
            os.dup2(null, number, inheritable=False)
            os.close(null)


_masked: list[set[int] | set[signal.Signals]] = []  # of forks under way: one, or one in another


def _before() -> None:
    """Hold signals back: the child would take one for its parent's, before it has let go of the parent's handlers."""
    no_fork.acquire()
    if _notified:
        _masked.append(signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT}))


def _after() -> None:
    if _masked:
        signal.pthread_sigmask(signal.SIG_SETMASK, _masked.pop())
    no_fork.release()


def _in_child() -> None:
    try:
        for holder in list(_owned):
            _give_up(holder)
        _owned.clear()
        for each in list(_notified):
            each.forked()
    finally:
        _after()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_in_child)
