"""The last minutes of a runtime, one sample a second, for plots."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from triton_distributed.observe import Outcome, Stats
from triton_distributed.serving.endpoint import ServedEndpoint

LENGTH = 300
"""Samples that are kept: five minutes."""

MOST_SERIES = 64
"""Endpoints of a sample, so that the memory is bounded: with all of them, a history has a few megabytes."""

_SERVED = ("requests", "errors", "refused", "items", "running", "waiting")
_CALLED = ("calls", "errors", "refused", "open")
_NEITHER_ERROR = (Outcome.OK, Outcome.CANCELLED, Outcome.REFUSED)


class Caller(Protocol):
    """The part of a client that is sampled."""

    stats: Stats

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
    endpoints: dict[str, tuple[int, ...]]
    calls: dict[str, tuple[int, ...]]


class History:
    """The last `LENGTH` samples. One thread adds at a time; any thread may read."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=LENGTH)

    def add(self, lag_s: float, endpoints: Iterable[ServedEndpoint], clients: Iterable[Caller]) -> None:
        """Take a sample, on the event loop. It takes some microseconds for each endpoint and client."""
        served: dict[str, tuple[int, ...]] = {}
        for each in endpoints:
            if len(served) < MOST_SERIES:
                waiting = len(each.gate.queue)
                served[each.name.path] = (*_ended(each.stats), each.stats.items, len(each.gate.running), waiting)
        called: dict[str, tuple[int, ...]] = {}
        for client in clients:
            path = client.name.path
            numbers = (*_ended(client.stats), client.stats.inflight)
            if (before := called.get(path)) is not None:
                called[path] = tuple(map(sum, zip(before, numbers, strict=True)))
            elif len(called) < MOST_SERIES:
                called[path] = numbers
        self._samples.append(Sample(time.time(), lag_s, served, called))

    def add_stuck(self, stuck_s: float) -> None:
        """Take a sample while the loop is stuck, in any thread: nothing has changed since the last one."""
        last = self._samples[-1] if self._samples else Sample(0.0, 0.0, {}, {})
        self._samples.append(last._replace(time=time.time(), lag_s=stuck_s))

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
                                      "running": [...], "waiting": [...]}},
                 "calls": {path: {"calls": [...], "errors": [...], "refused": [...], "open": [...]}}}

            `requests`, `calls`, `errors`, `refused` and `items` are totals: the difference of two neighbours is the
            rate. `errors` are neither refused nor cancelled. A value is null where the sample lacks the endpoint.
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


def _columns(rows: list[dict[str, tuple[int, ...]]], names: tuple[str, ...]) -> dict[str, dict[str, list[int | None]]]:
    nothing = (None,) * len(names)
    return {
        path: {name: [row.get(path, nothing)[index] for row in rows] for index, name in enumerate(names)}
        for path in dict.fromkeys(path for row in rows for path in row)
    }
