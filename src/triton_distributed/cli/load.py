"""The load of `trd bench`, and what it found. The arithmetic is pure; only `Load` makes calls."""

from __future__ import annotations

import asyncio
import math
import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Any, NamedTuple

from triton_distributed.errors import TritonError

SERIES = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
"""The upper bounds of a histogram's bars within a factor of ten: about the same width on a logarithmic scale."""

BAR = 40
"""Characters of the longest bar."""

_NONE = f"{'⋮':>9} │"


class Sample(NamedTuple):
    """One request.

    Attributes:
        due_s: when it was due, in seconds from the beginning. With a rate, this is the schedule's time.
        late_s: seconds from then until the call was made; the load itself was late by that.
        first_s: seconds from `due_s` to the first item; None if none came.
        whole_s: seconds from `due_s` to the end.
        items: the number of items.
        outcome: `ok`, or the name of the error.
        error: the text of the error; empty if there was none.
    """

    due_s: float
    late_s: float
    first_s: float | None
    whole_s: float
    items: int
    outcome: str
    error: str = ""


class Load:
    """Makes calls and measures them.

    Args:
        call: makes one call; it returns an async iterator of items.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._began = 0.0
        self.samples: list[Sample] = []

    async def at_rate(self, rate: float, seconds: float, rng: random.Random) -> None:
        """Begin calls at random moments (a Poisson process), whether or not earlier ones have ended: an open loop.

        A worker that stalls does not slow this load down, so each request that a stall delays counts with its delay.

        Args:
            rate: calls per second, on average.
            seconds: the duration; the calls under way at its end are waited for.
        """
        self._began = perf_counter()
        tasks: set[asyncio.Task[None]] = set()
        due_s = rng.expovariate(rate)
        while due_s < seconds:
            if (wait_s := self._began + due_s - perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            task = asyncio.create_task(self._measure(due_s))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due_s += rng.expovariate(rate)
        if tasks:
            await asyncio.wait(tasks)

    async def at_once(self, callers: int, seconds: float) -> None:
        """Let each of some callers begin its next call when its last one has ended: a closed loop."""
        self._began = perf_counter()

        async def caller() -> None:
            while (due_s := perf_counter() - self._began) < seconds:
                await self._measure(due_s)

        await asyncio.gather(*(caller() for _ in range(callers)))

    async def _measure(self, due_s: float) -> None:
        now = perf_counter()
        due = min(self._began + due_s, now)  # A timer may fire a little early.
        late_s = now - due
        first_s, items, outcome, words = None, 0, "ok", ""
        try:
            async for _ in self._call():
                if not items:
                    first_s = perf_counter() - due
                items += 1
        except TritonError as error:
            outcome, words = type(error).__name__, str(error)
        self.samples.append(Sample(due_s, late_s, first_s, perf_counter() - due, items, outcome, words))


class Quantiles(NamedTuple):
    """Seconds at which a share of the values lies: half, 90 %, 99 %, all."""

    p50: float
    p90: float
    p99: float
    max: float


def quantiles(values: Iterable[float]) -> Quantiles | None:
    """The quantiles of values (nearest rank); None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return Quantiles(*(ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.9, 0.99, 1.0)))


class Summary(NamedTuple):
    """What a load found.

    Attributes:
        requests: the number of requests.
        outcomes: their number by outcome.
        errors: the text of the first error of each kind.
        seconds: from the first request to the end of the last.
        items: the items of all requests.
        first, whole: quantiles of the times to the first item, and to the end, of the requests that ended well.
        late: quantiles of the times by which the load itself was late.
    """

    requests: int
    outcomes: dict[str, int]
    errors: dict[str, str]
    seconds: float
    items: int
    first: Quantiles | None
    whole: Quantiles | None
    late: Quantiles | None


def summary(samples: Sequence[Sample]) -> Summary:
    """Summarize samples."""
    well = [each for each in samples if each.outcome == "ok"]
    seconds = max((each.due_s + each.whole_s for each in samples), default=0.0) - min(
        (each.due_s for each in samples), default=0.0
    )
    return Summary(
        requests=len(samples),
        outcomes=dict(Counter(each.outcome for each in samples).most_common()),
        errors={each.outcome: each.error for each in reversed(samples) if each.error},
        seconds=seconds,
        items=sum(each.items for each in samples),
        first=quantiles(each.first_s for each in well if each.first_s is not None),
        whole=quantiles(each.whole_s for each in well),
        late=quantiles(each.late_s for each in samples),
    )


def bars(values: Sequence[float]) -> list[str]:
    """Draw a histogram of seconds on a logarithmic scale: one line for each bar. A run of empty bars is one line."""
    if not values:
        return []
    low, high = min(values), max(values)
    bounds = [
        each * 10.0**power
        for power in range(math.floor(math.log10(max(low, 1e-7))) - 1, math.ceil(math.log10(max(high, 1e-7))) + 1)
        for each in SERIES
    ]
    counts = Counter(bisect_left(bounds, value) for value in values)
    most = max(counts.values())
    lines: list[str] = []
    for place in range(min(counts), max(counts) + 1):
        if count := counts[place]:
            bar = "█" * round(BAR * count / most) or "▏"
            lines.append(f"≤ {duration(bounds[place]):>7} │{bar:<{BAR}} {count:,}")
        elif lines[-1] != _NONE:
            lines.append(_NONE)
    return lines


def duration(seconds: float) -> str:
    """Seconds as text with three digits and a fitting unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            value = seconds / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    raise AssertionError
