"""Counters by key that never fall: an endpoint may be withdrawn, and a client dropped, but what they counted stays."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

from triton_distributed.observe.histogram import Histogram
from triton_distributed.observe.stats import CallStats, RequestStats

K = TypeVar("K", bound=Hashable)
S = TypeVar("S", RequestStats, CallStats)

FEW = 8
"""Owners of one key among which none is looked for that is gone."""


class _Entry(Generic[S]):
    """The counters of one key.

    Attributes:
        past: the sum of the counters of owners that are gone.
        present: the counters of the others, each with a function that tells whether its owner is gone.
        most: the number of owners at which those that are gone are looked for.
    """

    __slots__ = ("most", "past", "present")

    def __init__(self, past: S, present: list[tuple[S, Callable[[], bool]]]) -> None:
        self.past: S = past
        self.present: list[tuple[S, Callable[[], bool]]] = present
        self.most = max(FEW, 2 * len(present))


class Totals(Generic[K, S]):
    """The counters of all owners that ever were, by key. The loop's thread adds owners, and any thread may read.

    Its size is bounded by the keys, and by twice the number of living owners.

    Args:
        make: makes counters without counts.
    """

    def __init__(self, make: Callable[[], S]) -> None:
        self._make: Callable[[], S] = make
        self._entries: dict[K, _Entry[S]] = {}

    @property
    def keys(self) -> list[K]:
        """The keys that have counters, oldest first."""
        return list(self._entries)

    def add(self, key: K, stats: S, gone: Callable[[], bool]) -> None:
        """Include the counters of one more owner.

        Args:
            gone: tells whether the owner counts nothing more, apart from what is in flight.
        """
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(self._make(), [])
        entry.present.append((stats, gone))
        if len(entry.present) > entry.most:
            # A reader has either the old entry or the new one, and both have all counts.
            self._entries[key] = self._without_gone(entry)

    def _without_gone(self, entry: _Entry[S]) -> _Entry[S]:
        past: S = self._make()
        present: list[tuple[S, Callable[[], bool]]] = []
        include(past, entry.past)
        for stats, gone in entry.present:
            if gone() and not stats.inflight:
                include(past, stats)
            else:
                present.append((stats, gone))
        return _Entry(past, present)

    def parts(self, key: K) -> Iterator[S]:
        """The counters whose sum is the total of a key."""
        entry = self._entries.get(key)
        if entry is not None:
            yield entry.past
            for stats, _ in tuple(entry.present):
                yield stats

    def total(self, key: K) -> S:
        """The sum of all counters of a key, as counters of its own."""
        total: S = self._make()
        for each in self.parts(key):
            include(total, each)
        return total


def include(total: S, more: S) -> None:
    """Add counters to others."""
    more.count()
    with more.lock:
        total.inflight += more.inflight
        total.items += more.items
        for index, count in enumerate(more.ended):
            total.ended[index] += count
        _include(total.duration, more.duration)
        _include(total.first_item, more.first_item)
        if isinstance(total, CallStats):
            assert isinstance(more, CallStats)
            total.retries += more.retries
            total.resumes += more.resumes
            total.hedges += more.hedges
        else:
            assert isinstance(more, RequestStats)
            _include(total.queue_wait, more.queue_wait)
            _include(total.loop_wait, more.loop_wait)


def _include(total: Histogram, more: Histogram) -> None:
    for index, count in enumerate(more.counts):
        total.counts[index] += count
    total.total_s += more.total_s
