"""Runtimes and forks: the child's copy is unusable, and says so."""

from __future__ import annotations

import os
import signal
import weakref
from typing import Protocol


class Forkable(Protocol):
    """Something that must know that this process is a fork of the one that made it."""

    def forked(self) -> None: ...


# Hooks that are registered with the interpreter cannot be taken back, so there is one, and it finds the live runtimes.
_alive: weakref.WeakSet[Forkable] = weakref.WeakSet()


def watch_forks(runtime: Forkable) -> None:
    """Call `runtime.forked()` in every child that is forked while it lives."""
    _alive.add(runtime)


_masked: list[set[int] | set[signal.Signals]] = []  # of forks under way: one, or one in another


def _before() -> None:
    """A signal that came to the child before it let go of the parent's handlers would be taken for the parent's."""
    if _alive:
        _masked.append(signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT}))


def _unmask() -> None:
    if _masked:
        signal.pthread_sigmask(signal.SIG_SETMASK, _masked.pop())


def _in_child() -> None:
    try:
        for runtime in list(_alive):
            runtime.forked()
    finally:
        _unmask()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_unmask, after_in_child=_in_child)
