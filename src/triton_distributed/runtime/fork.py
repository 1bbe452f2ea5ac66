"""Runtimes and forks: the child's copy is unusable, and says so."""

from __future__ import annotations

import os
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


def _in_child() -> None:
    for runtime in list(_alive):
        runtime.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
