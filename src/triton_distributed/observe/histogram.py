"""Histograms of durations: plain numbers that one event loop writes and any thread may read.

A duration is kept as it comes, which costs one `append`. Durations are counted when some hundred have come, or when the
histogram is read, in whichever thread that is. Counting each at once would cost a call 4 % more instructions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

BOUNDS_S: Final[tuple[float, ...]] = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05,
    0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0,
)  # fmt: skip
"""The upper bounds of the buckets in seconds, each inclusive. One more bucket holds what took longer."""


MOST_FRESH: Final = 512
"""Durations that are kept before they are counted, which then takes the loop some hundred microseconds."""


class Histogram:
    """Counts durations by their length.

    Attributes:
        fresh: durations in seconds that are not counted yet. The loop appends to it.
        counts: the number of durations in each bucket: one for each of `BOUNDS_S`, and one for all above.
        total_s: the sum of all counted durations in seconds.
    """

    __slots__ = ("counts", "fresh", "total_s")

    def __init__(self) -> None:
        self.fresh: list[float] = []
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.total_s = 0.0

    def count(self) -> None:
        """Count the fresh durations. Only one thread may do this at a time."""
        if self.fresh:
            self.add(taken(self.fresh))

    def add(self, durations_s: list[float]) -> None:
        """Count durations in seconds, in ascending order."""
        if not durations_s:  # Most histograms of a process are idle, and each sample counts all of them.
            return
        counts, below = self.counts, 0
        for index, bound in enumerate(BOUNDS_S):
            upto = bisect_right(durations_s, bound, below)
            counts[index] += upto - below
            below = upto
        counts[-1] += len(durations_s) - below
        self.total_s += sum(durations_s)

    def __repr__(self) -> str:
        return f"<Histogram of {sum(self.counts) + len(self.fresh)} durations, {self.total_s:.3g} s in all>"


def taken(fresh: list[float]) -> list[float]:
    """Take all durations from a list to which another thread may append meanwhile; returns them in ascending order."""
    durations_s = fresh[:]
    del fresh[: len(durations_s)]
    durations_s.sort()
    return durations_s


def quantile(counts: Sequence[int], q: float) -> float | None:
    """Estimate a quantile from a histogram's buckets.

    Within a bucket, durations are taken as evenly spread, as Prometheus' `histogram_quantile` does.

    Args:
        counts: the number of durations in each bucket, as in `Histogram.counts`; or the difference of two of these.
        q: the quantile, from 0 to 1: 0.5 is the median.

    Returns:
        seconds; the highest bound if the quantile lies above it; None without any duration.
    """
    total = sum(counts)
    if total <= 0:
        return None
    rank, seen = q * total, 0
    for index, count in enumerate(counts[:-1]):
        if count and seen + count >= rank:
            lower = BOUNDS_S[index - 1] if index else 0.0
            return lower + (BOUNDS_S[index] - lower) * max(0.0, rank - seen) / count
        seen += count
    return BOUNDS_S[-1]
