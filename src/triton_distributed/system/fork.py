"""Forks: a child gives up the descriptors that it inherited, and its copies of runtimes raise ForkError.

A child that kept a copy of a socket would keep the connection open after its parent has died, and the peer would not
notice the death. So each descriptor has an entry here, and one hook gives up all of them in a child. Objects that hold
more than descriptors, such as runtimes, are notified.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import weakref
from typing import Any, Protocol


class Forkable(Protocol):
    """An object that must be notified in a fork of the process that made it."""

    def forked(self) -> None: ...


# The interpreter's fork hooks cannot be removed. So there is only one, and it uses the entries that are still alive.
_owned: weakref.WeakSet[Any] = weakref.WeakSet()
_notified: weakref.WeakSet[Forkable] = weakref.WeakSet()

no_fork = threading.RLock()
"""Held between opening a descriptor and `own` if another thread may fork. Reentrant, as a finalizer may fork, too.

A runtime's thread also holds it while it imports a module late: in a child that is forked meanwhile, the module would
stay locked by a thread that the child does not have.
"""


def own(holder: Any) -> None:
    """Give up a descriptor in every child that is forked while its holder lives.

    Args:
        holder: a socket, an asyncio transport, or another object with a `fileno()`, which is -1 without a descriptor.
    """
    _owned.add(holder)


def watch_forks(each: Forkable) -> None:
    """Call `each.forked()` in every child that is forked while `each` lives, after all descriptors were given up."""
    _notified.add(each)


def _give_up(holder: Any) -> None:
    """Give up an inherited descriptor without closing its number.

    Objects copied from the parent still use the number and would close it a second time. From now on it refers to the
    null device.
    """
    with contextlib.suppress(OSError, ValueError):  # The descriptor was closed.
        sock = holder.get_extra_info("socket") if hasattr(holder, "get_extra_info") else holder
        number = -1 if sock is None else sock.fileno()
        if number >= 0:
            null = os.open(os.devnull, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
            os.dup2(null, number, inheritable=False)
            os.close(null)


_forks = 0


def count() -> int:
    """Return how often this process was forked while Python code ran: each child has a copy of all objects."""
    return _forks


_masked: list[set[int] | set[signal.Signals]] = []  # Of the forks under way, which may be nested.


def _before() -> None:
    """Block signals until the child has given up its parent's handlers, which must not handle the child's signals."""
    global _forks
    no_fork.acquire()
    _forks += 1
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
