"""Reads a runtime's counters as metrics: in any thread, without its loop, and without holding the loop for long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

from triton_distributed import __version__
from triton_distributed.calling.candidates import Candidates
from triton_distributed.compiled import is_compiled
from triton_distributed.discovery import Answering, Discovery
from triton_distributed.external.certificate_ends import certificate_ends
from triton_distributed.names import EndpointName
from triton_distributed.observe import BOUNDS_S, LAG_BOUNDS_S, CallStats, Histogram, Outcome, RequestStats
from triton_distributed.observe.labels import Labels
from triton_distributed.observe.totals import include
from triton_distributed.serving.endpoint import ServedEndpoint
from triton_distributed.status import families as f
from triton_distributed.status.families import Family
from triton_distributed.status.metrics import Sources
from triton_distributed.transport.session import Session

T = TypeVar("T")

SOME = 500
"""Streams that are read before the next pause: some tens of microseconds."""

MOST_CALLED = 500
"""Called endpoints that have lines of their own, about 60 each. A gateway may call endpoints that its users name."""

OTHERS = "(others)"
"""The endpoint of the calls to all further ones, in the order of their first calls."""

MOST_COPIES = 10
"""Attempts to copy a dict that changes meanwhile. A second one is rare."""


class Buckets(NamedTuple):
    """A histogram.

    Attributes:
        bounds: the upper bounds of the buckets; one more bucket has no bound.
        counts: the number of durations in each bucket.
        total: the sum of all durations.
    """

    bounds: Sequence[float]
    counts: Sequence[int]
    total: float


Row = tuple[Mapping[str, str], "float | Buckets"]
Reading = tuple[Family, Iterable[Row]]


def readings(sources: Sources, pause: Callable[[], None]) -> Iterator[Reading]:
    """Every metric of `families.FAMILIES` but `LEFT_OUT`, with its lines. Read the lines before the next metric.

    The lines are made one by one. If many objects existed at once, Python's garbage collector would start, and would
    hold the interpreter's lock for as long as all objects of the program take it.

    Args:
        pause: called after each piece of work, of at most some hundred microseconds.
    """
    yield from _served(sources, pause)
    yield from _called(sources, pause)
    yield from _sessions(sources, pause)
    yield from _process(sources)


def _served(sources: Sources, pause: Callable[[], None]) -> Iterator[Reading]:
    rows = [
        (_labels(name, labels), _summed(sources.served.parts((name, labels)), RequestStats(), pause))
        for name, labels in sources.served.keys
    ]
    yield f.REQUESTS, _by_outcome(rows, Outcome.UNREACHABLE)
    yield f.REQUEST_DURATION, ((labels, _buckets(stats.duration)) for labels, stats in rows)
    yield f.REQUEST_FIRST_ITEM, ((labels, _buckets(stats.first_item)) for labels, stats in rows)
    yield f.REQUEST_QUEUE, ((labels, _buckets(stats.queue_wait)) for labels, stats in rows)
    yield f.REQUEST_LOOP_WAIT, ((labels, _buckets(stats.loop_wait)) for labels, stats in rows)
    yield f.ITEMS, ((labels, stats.items) for labels, stats in rows)
    present = [(_labels(each.name, each.labels), each) for each in _copied(lambda: sources.server.endpoints)]
    yield f.IN_FLIGHT, ((labels, len(each.gate.running)) for labels, each in present)
    yield f.QUEUED, ((labels, len(each.gate.queue)) for labels, each in present)
    limits = [(labels, each.gate.queue.max_inflight) for labels, each in present]
    yield f.LIMIT, ((labels, limit) for labels, limit in limits if limit is not None)
    yield f.SERVING, ((labels, _serves(each)) for labels, each in present)


def _called(sources: Sources, pause: Callable[[], None]) -> Iterator[Reading]:
    names = sources.called.keys
    rows = [
        (_labels(name, ()), _summed(sources.called.parts(name), CallStats(), pause)) for name in names[:MOST_CALLED]
    ]
    if others := names[MOST_CALLED:]:
        parts = chain.from_iterable(map(sources.called.parts, others))
        rows.append(({"endpoint": OTHERS}, _summed(parts, CallStats(), pause)))
    yield f.CALLS, _by_outcome(rows, Outcome.CUT)
    yield f.CALL_DURATION, ((labels, _buckets(stats.duration)) for labels, stats in rows)
    yield f.CALL_FIRST_ITEM, ((labels, _buckets(stats.first_item)) for labels, stats in rows)
    yield f.CALLS_IN_FLIGHT, ((labels, stats.inflight) for labels, stats in rows)
    yield f.RETRIES, ((labels, stats.retries) for labels, stats in rows)
    yield f.RESUMES, ((labels, stats.resumes) for labels, stats in rows)
    yield f.HEDGES, ((labels, stats.hedges) for labels, stats in rows)
    known = [
        (_labels(each.name, ()), each) for each in _copied(lambda: list(sources.candidates.values()))[:MOST_CALLED]
    ]
    yield f.INSTANCES, (row for labels, each in known for row in _by(labels, "state", _instances(each)))
    yield f.EJECTIONS, ((labels, each.ejector.stats.ejections) for labels, each in known)


def _sessions(sources: Sources, pause: Callable[[], None]) -> Iterator[Reading]:
    dialled: list[Session] = _copied(lambda: list(sources.pool.sessions))
    accepted: list[Session] = _copied(lambda: list(sources.server.sessions))
    yield f.SESSIONS, _by({}, "role", {"dialled": len(dialled), "accepted": len(accepted)})
    yield f.BYTES, _by({}, "direction", {"received": sources.share.received, "sent": sources.share.sent})
    sessions = dialled + accepted
    yield f.STREAMS, [({}, sum(len(each.streams) for each in sessions))]
    yield f.BLOCKED, [({}, sum(_blocked(each, pause) for each in sessions))]


def _process(sources: Sources) -> Iterator[Reading]:
    yield f.HELD, [({}, sources.held.bytes)]
    yield f.HELD_LIMIT, [({}, sources.held.most)]
    yield f.SHARED, [({}, sources.shared.bytes)]
    yield f.SHARED_LIMIT, [({}, sources.shared.limit)]
    loop, threads = sources.loop, sources.threads
    yield f.LAG, [({}, Buckets(LAG_BOUNDS_S, tuple(loop.lag), loop.lag_s))]
    yield f.STALLS, [({}, loop.stalls)]
    yield f.STALLED, [({}, loop.stalled_s)]
    yield f.STUCK, [({}, loop.stuck_s)]
    running, parked, waiting, _ = threads.counts()
    yield f.THREADS, _by({}, "state", {"running": running, "parked": parked, "waiting": waiting})
    yield f.THREADS_LIMIT, [({}, threads.most)]
    answers, age_s = _state(sources.discovery)
    backend = {"backend": type(sources.discovery).__name__.removesuffix("Discovery").lower()}
    yield f.DISCOVERY_UP, [(backend, answers)]
    yield f.DISCOVERY_AGE, [] if age_s is None else [(backend, age_s)]
    nats = sources.nats
    yield f.NATS_UP, [({}, nats.connected)] if nats.used else []
    yield f.NATS_RECONNECTIONS, [({}, nats.reconnections)] if nats.used else []
    yield f.CERTIFICATES, list(_certificates(sources.certificates))
    yield f.DRAINING, [({}, sources.draining())]
    build = "compiled" if is_compiled() else "pure Python"
    yield f.INFO, [({"version": __version__, "build": build, "instance_id": str(sources.instance_id)}, 1)]


def _certificates(files: Mapping[str, str]) -> Iterator[Row]:
    for setting, path in files.items():
        try:
            ends = list(certificate_ends(Path(path).read_text(encoding="ascii", errors="replace")))
        except (OSError, ValueError):  # It is being replaced, or `trd doctor` says what is wrong with it.
            continue
        if ends:
            yield {"setting": setting}, min(ends)


def _labels(name: EndpointName, more: Labels) -> dict[str, str]:
    return {"endpoint": str(name), **dict(more)}


def _by(labels: Mapping[str, str], name: str, values: Mapping[str, float]) -> list[Row]:
    return [({**labels, name: text}, value) for text, value in values.items()]


S = TypeVar("S", RequestStats, CallStats)


def _summed(parts: Iterable[S], total: S, pause: Callable[[], None]) -> S:
    for each in parts:
        include(total, each)
        pause()
    return total


def _by_outcome(rows: Sequence[tuple[Mapping[str, str], RequestStats | CallStats]], never: Outcome) -> Iterator[Row]:
    outcomes = [each for each in Outcome if each is not never]
    for labels, stats in rows:
        yield from _by(labels, "outcome", {each.name.lower(): stats.ended[each] for each in outcomes})


def _buckets(histogram: Histogram) -> Buckets:
    return Buckets(BOUNDS_S, histogram.counts, histogram.total_s)


def _serves(endpoint: ServedEndpoint) -> bool:
    return bool(endpoint.listed) and not endpoint.gate.draining and not endpoint.gate.paused


def _instances(candidates: Candidates) -> dict[str, float]:
    return {
        "listed": len(candidates.table.instances),
        "candidate": len(candidates.instances),
        "out_of_rotation": len(candidates.rotation.down),
        "ejected": candidates.ejector.stats.out,
    }


def _blocked(session: Session, pause: Callable[[], None]) -> int:
    streams, blocked = _copied(lambda: list(session.streams.values())), 0
    for start in range(0, len(streams), SOME):
        blocked += sum(stream.credit <= 0 for stream in streams[start : start + SOME])
        if start:
            pause()
    return blocked


def _state(discovery: Discovery) -> tuple[bool, float | None]:
    if not isinstance(discovery, Answering):
        return True, 0.0  # It is in this process.
    return discovery.answers, time.monotonic() - discovery.answered_at if discovery.answered_at else None


def _copied(read: Callable[[], T]) -> T:
    """Copy what the loop may change meanwhile. The copy fails only if garbage is collected in the middle of it."""
    for _ in range(MOST_COPIES):
        try:
            return read()
        except RuntimeError:  # A dict has changed its size.
            continue
    return read()
