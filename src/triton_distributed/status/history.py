"""The last minutes of a runtime, one sample a second, for plots."""

from __future__ import annotations

import operator
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from triton_distributed.observe import Outcome, Stats, quantile
from triton_distributed.observe.stats import TimedStats
from triton_distributed.serving.endpoint import ServedEndpoint

LENGTH = 300
"""Samples that are kept: five minutes."""

MOST_SERIES = 64
"""Endpoints of a sample, so that the memory is bounded: with all of them, a history has a few megabytes."""

_SERVED = ("requests", "errors", "refused", "items", "running", "waiting", "p50_s", "p99_s")
_CALLED = ("calls", "errors", "refused", "open", "p50_s", "p99_s")
_NEITHER_ERROR = (Outcome.OK, Outcome.CANCELLED, Outcome.REFUSED)


Numbers = tuple[float | None, ...]


class Callers(Protocol):
    """The clients of a runtime."""

    def counted(self) -> Iterable[Caller]:
        """The counters, those of one endpoint after one another."""


class Caller(Protocol):
    """The counters of calls to an endpoint."""

    @property
    def stats(self) -> TimedStats: ...

    @property
    def name(self) -> Any: ...


class Sample(NamedTuple):
    """A runtime at one moment.

    Attributes:
        time: seconds since 1970.
        lag_s: seconds that the event loop took to answer; while it is stuck, seconds for which it has not answered.
        endpoints, calls: numbers by the endpoint's path, in the order of `_SERVED` and `_CALLED`.
    """

    time: float
    lag_s: float
    endpoints: dict[str, Numbers]
    calls: dict[str, Numbers]


class History:
    """The last `LENGTH` samples. One thread adds at a time; any thread may read."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=LENGTH)
        self._served: dict[str, list[int]] = {}  # The durations of the last sample: a histogram for each endpoint.
        self._called: dict[str, list[int]] = {}

    def add(self, lag_s: float, endpoints: Iterable[ServedEndpoint], clients: Iterable[Caller]) -> None:
        """Take a sample, on the event loop. It takes some microseconds for each endpoint and client."""
        served: dict[str, tuple[int, ...]] = {}
        durations: dict[str, list[int]] = {}
        for each in endpoints:
            if len(served) < MOST_SERIES:
                path, waiting = each.name.path, len(each.gate.queue)
                served[path] = (*_ended(each.stats), each.stats.items, len(each.gate.running), waiting)
                each.stats.count()
                durations[path] = list(each.stats.duration.counts)
        called: dict[str, tuple[int, ...]] = {}
        call_durations: dict[str, list[int]] = {}
        for client in clients:
            if len(called) == MOST_SERIES and client.name.path not in called:
                break  # A process may have called thousands.
            client.stats.count()
            path, counts = client.name.path, client.stats.duration.counts
            numbers = (*_ended(client.stats), client.stats.inflight)
            if (before := called.get(path)) is not None:
                called[path] = _sums(before, numbers)
                call_durations[path] = list(_sums(call_durations[path], counts))
            else:
                called[path], call_durations[path] = numbers, list(counts)
        endpoints_now = _with_quantiles(served, durations, self._served)
        calls_now = _with_quantiles(called, call_durations, self._called)
        self._served, self._called = durations, call_durations
        self._samples.append(Sample(time.time(), lag_s, endpoints_now, calls_now))

    def add_stuck(self, stuck_s: float) -> None:
        """Take a sample while the loop is stuck, in any thread: nothing has changed since the last one."""
        last = self._samples[-1] if self._samples else Sample(0.0, 0.0, {}, {})
        endpoints = {path: (*numbers[:-2], None, None) for path, numbers in last.endpoints.items()}
        calls = {path: (*numbers[:-2], None, None) for path, numbers in last.calls.items()}
        self._samples.append(Sample(time.time(), stuck_s, endpoints, calls))

    def since(self, start: float) -> dict[str, Any]:
        """The samples after a time, as columns of equal length, oldest first.

        Args:
            start: seconds since 1970; 0 for all samples.

        Returns:
            a dict for JSON::

                {"now": 1700000000.0, "interval_s": 1.0,
                 "times": [...],         # seconds since 1970
                 "loop_lag_s": [...],    # how late the event loop was; it grows while the loop is stuck
                 "endpoints": {path: {"requests": [...], "errors": [...], "refused": [...], "items": [...],
                                      "running": [...], "waiting": [...], "p50_s": [...], "p99_s": [...]}},
                 "calls": {path: {"calls": [...], "errors": [...], "refused": [...], "open": [...], "p50_s": [...],
                                  "p99_s": [...]}}}

            `requests`, `calls`, `errors`, `refused` and `items` are totals: the difference of two neighbours is the
            rate. `errors` are neither refused nor cancelled. `p50_s` and `p99_s` are the seconds within which half, and
            99 %, of the requests ended that ended since the sample before. A value is null where the sample lacks it.
        """
        samples = [each for each in list(self._samples) if each.time > start]
        return {
            "now": time.time(),
            "interval_s": 1.0,
            "times": [each.time for each in samples],
            "loop_lag_s": [each.lag_s for each in samples],
            "endpoints": _columns([each.endpoints for each in samples], _SERVED),
            "calls": _columns([each.calls for each in samples], _CALLED),
        }


def _ended(stats: Stats) -> tuple[int, int, int]:
    """The number of requests or calls that have ended, that have failed, and that were refused."""
    total = sum(stats.ended)
    return total, total - sum(stats.ended[each] for each in _NEITHER_ERROR), stats.ended[Outcome.REFUSED]


def _sums(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(operator.add, one, other))


def _with_quantiles(
    numbers: dict[str, tuple[int, ...]], durations: dict[str, list[int]], before: dict[str, list[int]]
) -> dict[str, Numbers]:
    """The numbers of each path, with the quantiles of the durations that were added since the sample before."""
    found: dict[str, Numbers] = {}
    for path, counts in durations.items():
        new = list(map(operator.sub, counts, before[path])) if path in before else counts
        if min(new) < 0:  # The endpoint was served again, or a client is gone.
            new = []
        found[path] = (*numbers[path], quantile(new, 0.5), quantile(new, 0.99))
    return found


def _columns(rows: list[dict[str, Numbers]], names: tuple[str, ...]) -> dict[str, dict[str, list[float | None]]]:
    nothing = (None,) * len(names)
    return {
        path: {name: [row.get(path, nothing)[index] for row in rows] for index, name in enumerate(names)}
        for path in dict.fromkeys(path for row in rows for path in row)
    }
