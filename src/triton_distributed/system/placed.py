"""Memory that a program has placed for all processes of the host: written once, then mapped where it is needed."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Iterable
from typing import Any, Protocol, TypeVar

from triton_distributed.system.shared_memory import SUPPORTED, UNTRACKED, Segment, mappings

T = TypeVar("T")


class User(Protocol):
    """A session that has offered a segment to its peer."""

    def withdraw_soon(self, segment: int) -> None:
        """Withdraw a segment. Called in any thread."""


class Placed:
    """A segment whose content never changes.

    Attributes:
        segment: the memory.
        start, end: the addresses at which this process has mapped it.
        users: sessions that have offered it.
    """

    __slots__ = ("end", "segment", "start", "users")

    def __init__(self, segment: Segment, start: int) -> None:
        self.segment, self.start, self.end = segment, start, start + segment.size
        self.users: set[User] = set()


_placed: dict[Any, Placed] = {}  # by a weak reference to the mapping; bounded by what the program shares


def place(data: memoryview) -> memoryview | None:
    """Copy bytes into memory that other processes can map.

    Args:
        data: one-dimensional, of format `B`, not empty.

    Returns:
        a read-only view of the copy, which exists until its last use; None if this system has no such memory.

    Raises:
        OSError: there is no memory left.
    """
    if not SUPPORTED:
        return None
    segment = Segment(data.nbytes)
    segment.fill(data)
    # Private, so that a library which ignores the flag of a read-only array changes its own pages only.
    writable = mmap.PROT_READ | mmap.PROT_WRITE
    mapping = mmap.mmap(segment.fileno(), data.nbytes, mmap.MAP_PRIVATE, writable, **UNTRACKED)
    view = memoryview(mapping).toreadonly()
    _placed[weakref.ref(mapping, _gone)] = Placed(segment, mappings().address_of(view))
    return view


def _gone(mapping: Any) -> None:
    placed = _placed.pop(mapping)
    if placed.segment.fileno() >= 0:  # else this is a child of the process whose sessions they are
        for user in _copied(placed.users):
            user.withdraw_soon(placed.segment.id)
        placed.segment.close()


def _copied(items: Iterable[T]) -> list[T]:
    """Copy a collection that the garbage collector, or another thread, may change meanwhile."""
    while True:
        with contextlib.suppress(RuntimeError):
            return list(items)


def find(view: memoryview) -> tuple[Placed, int] | None:
    """Return the placed memory that holds all bytes of a view, and the view's offset in it; None for other memory.

    In a child of the process that placed it, this is other memory too: the child has no descriptor of it.
    """
    if not _placed:
        return None
    start: int = mappings().address_of(view)
    for each in _copied(_placed.values()):
        if each.start <= start and start + view.nbytes <= each.end and each.segment.fileno() >= 0:
            return each, start - each.start
    return None
