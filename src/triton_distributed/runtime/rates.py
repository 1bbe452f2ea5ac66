"""What a worker does per second: the difference of two readings of its counters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from triton_distributed.observe import BOUNDS_S, LAG_BOUNDS_S, quantile
from triton_distributed.runtime.statistics import EndpointStatistics, LoopStatistics, of_endpoint, of_loop
from triton_distributed.runtime.worker import Worker
from triton_distributed.transport.fairness import FairShare

ERRORS = ("error", "invalid", "deadline", "lost")
"""Outcomes that count as errors. A request that its caller cancelled is not an error."""


class Counters(msgspec.Struct, frozen=True):
    """The counters of a worker at one moment: the part of `RuntimeStatistics` that looks at no session and no stream,
    so that asking once a second does not hold up a worker with thousands of them."""

    instance_id: int
    endpoints: tuple[EndpointStatistics, ...]
    received_bytes: int
    sent_bytes: int
    loop: LoopStatistics
    problems: tuple[str, ...] = ()


def counters_of(instance_id: int, worker: Worker, share: FairShare, problems: Iterable[str] = ()) -> Counters:
    """Read the counters of a worker, and of its runtime's sessions."""
    return Counters(
        instance_id=instance_id,
        endpoints=tuple(map(of_endpoint, worker.server.endpoints)),
        received_bytes=share.received,
        sent_bytes=share.sent,
        loop=of_loop(worker.watchdog.stats),
        problems=tuple(problems),
    )


class EndpointRates(msgspec.Struct, frozen=True):
    """One endpoint of one worker, or the sum of several, in some interval.

    Attributes:
        requests_per_s: requests that ended, except those that were refused.
        errors_per_s: those of them that ended with an outcome in `ERRORS`.
        refused_per_s: requests that were refused before their handlers began.
        items_per_s: items of requests that ended well.
        running, waiting: requests that run, and that wait in the queue, at the end of the interval.
        max_inflight, max_queue: the limits; `max_inflight` is None if there is no limit.
        durations: a histogram of the requests that ended, by `observe.BOUNDS_S`.
        first_items: the same of the times to their first items.
    """

    requests_per_s: float
    errors_per_s: float
    refused_per_s: float
    items_per_s: float
    running: int
    waiting: int
    max_inflight: int | None
    max_queue: int
    durations: tuple[int, ...]
    first_items: tuple[int, ...]

    def duration_s(self, share: float) -> float | None:
        """The seconds within which a share of the requests ended, from 0 to 1; None if none ended."""
        return quantile(self.durations, share)

    def first_item_s(self, share: float) -> float | None:
        """The seconds within which a share of the requests had a first item, from 0 to 1; None if none ended."""
        return quantile(self.first_items, share)


class WorkerRates(msgspec.Struct, frozen=True):
    """One worker in some interval.

    Attributes:
        endpoints: its endpoints by path.
        received_per_s, sent_per_s: bytes of all its sessions per second.
        lag_s: the longest delay of a timer of its event loop, in seconds: an upper bound, from `observe.LAG_BOUNDS_S`;
            None if no timer was measured.
    """

    endpoints: Mapping[str, EndpointRates]
    received_per_s: float
    sent_per_s: float
    lag_s: float | None


def rates(before: Counters, after: Counters, seconds: float) -> WorkerRates:
    """What a worker did between two moments.

    Args:
        before, after: the counters of one worker.
        seconds: the time between them, above 0.
    """
    known = {each.name: each for each in before.endpoints}
    lag = _difference(after.loop.lag, before.loop.lag)
    return WorkerRates(
        endpoints={each.name: _of_endpoint(known.get(each.name), each, seconds) for each in after.endpoints},
        received_per_s=max(0, after.received_bytes - before.received_bytes) / seconds,
        sent_per_s=max(0, after.sent_bytes - before.sent_bytes) / seconds,
        lag_s=max((_lag_bound(index) for index, count in enumerate(lag) if count), default=None),
    )


def _of_endpoint(before: EndpointStatistics | None, after: EndpointStatistics, seconds: float) -> EndpointRates:
    if before is not None and any(after.outcomes[name] < count for name, count in before.outcomes.items()):
        before = None  # The endpoint was served again meanwhile, so it counts from 0.
    outcomes = {name: count - (before.outcomes[name] if before else 0) for name, count in after.outcomes.items()}
    refused = outcomes["refused"]
    return EndpointRates(
        requests_per_s=(sum(outcomes.values()) - refused) / seconds,
        errors_per_s=sum(outcomes[name] for name in ERRORS) / seconds,
        refused_per_s=refused / seconds,
        items_per_s=(after.items - (before.items if before else 0)) / seconds,
        running=after.running,
        waiting=after.waiting,
        max_inflight=after.max_inflight,
        max_queue=after.max_queue,
        durations=_difference(after.duration.counts, before.duration.counts if before else ()),
        first_items=_difference(after.first_item.counts, before.first_item.counts if before else ()),
    )


def _difference(after: Sequence[int], before: Sequence[int]) -> tuple[int, ...]:
    return tuple(a - b for a, b in zip(after, before, strict=True)) if before else tuple(after)


def _lag_bound(index: int) -> float:
    return LAG_BOUNDS_S[min(index, len(LAG_BOUNDS_S) - 1)]


def total(several: Iterable[EndpointRates]) -> EndpointRates:
    """The sum of the rates of one endpoint on several workers. It has no limit if one of them has none."""
    found = list(several)
    limits = [each.max_inflight for each in found]
    return EndpointRates(
        requests_per_s=sum(each.requests_per_s for each in found),
        errors_per_s=sum(each.errors_per_s for each in found),
        refused_per_s=sum(each.refused_per_s for each in found),
        items_per_s=sum(each.items_per_s for each in found),
        running=sum(each.running for each in found),
        waiting=sum(each.waiting for each in found),
        max_inflight=None if None in limits else sum(filter(None, limits)),
        max_queue=sum(each.max_queue for each in found),
        durations=_sum(each.durations for each in found),
        first_items=_sum(each.first_items for each in found),
    )


def _sum(histograms: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    nothing = (0,) * (len(BOUNDS_S) + 1)
    return tuple(map(sum, zip(nothing, *histograms, strict=True)))
