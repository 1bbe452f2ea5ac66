"""The state of a runtime at one moment: plain frozen values, made without I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from triton_distributed.calling.candidates import Candidates
from triton_distributed.events import PulledMessages
from triton_distributed.events.inbox import Inbox
from triton_distributed.names import EndpointName
from triton_distributed.observe import CallStats, Histogram, LoopStats, Outcome
from triton_distributed.runtime.clients import Clients
from triton_distributed.serving.endpoint import ServedEndpoint
from triton_distributed.serving.state import RequestState
from triton_distributed.serving.threads import HandlerThreads
from triton_distributed.transport.session import Session


class HistogramStatistics(msgspec.Struct, frozen=True):
    """A histogram of durations.

    Attributes:
        counts: the number of durations in each bucket: one for each upper bound in `observe.BOUNDS_S`, which are
            seconds, and one for all above.
        total_s: the sum of all durations in seconds.
    """

    counts: tuple[int, ...]
    total_s: float


class EndpointStatistics(msgspec.Struct, frozen=True):
    """One endpoint that the runtime serves.

    Attributes:
        name: its path, `namespace/components/component/endpoint`, as in error texts.
        state: `starting` (discovery has not accepted it yet), `serving`, `paused` or `draining`.
        addresses: the addresses that the worker publishes.
        listed: the addresses that discovery lists for it now; empty if it is not listed.
        running: requests that were admitted and have not ended.
        waiting: requests in its queue.
        requests: the number of requests in each state: `waiting`, `announced` (the handler is about to begin),
            `running`, and `cleaning` (the handler was cancelled and has not ended).
        max_inflight, max_queue: its limits; `max_inflight` is None if there is no limit.
        mean_s: mean duration of about the last 20 handlers, in seconds; 0 without `max_inflight`.
        items: items sent so far by handlers that ended well.
        outcomes: the number of requests that have ended, by outcome.
        duration: of requests whose handler began: from the arrival to the end.
        first_item: from the arrival to the first item.
        queue_wait: from the arrival to the admission.
        loop_wait: from the admission to the handler's first step.
    """

    name: str
    state: str
    addresses: tuple[str, ...]
    listed: tuple[str, ...]
    running: int
    waiting: int
    requests: Mapping[str, int]
    max_inflight: int | None
    max_queue: int
    mean_s: float
    items: int
    outcomes: Mapping[str, int]
    duration: HistogramStatistics
    first_item: HistogramStatistics
    queue_wait: HistogramStatistics
    loop_wait: HistogramStatistics


class CallStatistics(msgspec.Struct, frozen=True):
    """One endpoint that the runtime calls, or has a client of.

    Attributes:
        name: its path.
        clients: the number of the program's clients that exist now.
        open: calls under way, over all clients.
        outcomes: the number of calls that have ended, by outcome, over all clients, also those that were dropped.
        instances: ids of the instances that discovery lists.
        candidates: ids of the instances to which a call may be sent now.
        out_of_rotation: ids of the lost instances, each with the number of failed probes.
        ejected: the number of instances that are ejected now.
        ejections: the number of ejections so far.
        load: open streams on each instance that has any, by id.
        duration: of ended calls, from their begin to the end.
        first_item: of calls that stream, from their begin to the arrival of the first item.
        retries: further requests that were sent after a failed attempt.
        resumes: of these, those that were to continue a stream.
        hedges: second attempts beside the first one.
    """

    name: str
    clients: int
    open: int
    outcomes: Mapping[str, int]
    instances: tuple[int, ...]
    candidates: tuple[int, ...]
    out_of_rotation: Mapping[int, int]
    ejected: int
    ejections: int
    load: Mapping[int, int]
    duration: HistogramStatistics
    first_item: HistogramStatistics
    retries: int
    resumes: int
    hedges: int


class SessionStatistics(msgspec.Struct, frozen=True):
    """One connection to another runtime.

    Attributes:
        address: the peer's address.
        role: `dialled` by this runtime, or `accepted`.
        phase: `greeting`, `open`, `going` (no new streams) or `lost`.
        silent: a reply is outstanding and nothing arrived for `TRD_HEALTH_TIMEOUT_S`.
        paused: the kernel accepts no more output for now.
        streams: the number of open streams.
        blocked: streams that may not send until their reader at the other end reads.
        queued_bytes: output that waits to be written, in bytes.
        waiting: requests and handlers that wait until the kernel accepts output.
        unread_messages: received messages that were not read yet.
        incomplete_bytes: announced sizes of messages that have not arrived completely, in bytes.
        window_bytes: bytes that the peer may send unread, over all open streams.
        window_limit_bytes: the budget of these windows, `TRD_SESSION_WINDOW_BYTES`.
    """

    address: str
    role: str
    phase: str
    silent: bool
    paused: bool
    streams: int
    blocked: int
    queued_bytes: int
    waiting: int
    unread_messages: int
    incomplete_bytes: int
    window_bytes: int
    window_limit_bytes: int


class SubscriptionStatistics(msgspec.Struct, frozen=True):
    """One subscription to events.

    Attributes:
        subject: the subject of the events.
        waiting: events that were not read yet.
        waiting_bytes: bytes of those events.
        dropped: events that were lost because the subscription did not keep up.
    """

    subject: str
    waiting: int
    waiting_bytes: int
    dropped: int


class QueueStatistics(msgspec.Struct, frozen=True):
    """One `async with queue.pull()` of the program.

    Attributes:
        name: the name of the work queue.
        ready: messages that have arrived and were not taken yet.
        requested: messages that the server may still send for the present request.
    """

    name: str
    ready: int
    requested: int


class ThreadStatistics(msgspec.Struct, frozen=True):
    """The threads of plain handlers.

    Attributes:
        limit: the most handlers that run at once, `TRD_THREADS`.
        running: handlers that run now.
        parked: generators that wait for their readers.
        waiting: handlers that wait for a place or a thread.
        threads: threads that exist or are about to be started.
    """

    limit: int
    running: int
    parked: int
    waiting: int
    threads: int


class DiscoveryStatistics(msgspec.Struct, frozen=True):
    """The discovery of a runtime.

    Attributes:
        backend: the name of the discovery's class.
        where: its address, as in error texts.
        registered: paths of the served endpoints that it lists now.
        watched: paths of the endpoints that are watched.
    """

    backend: str
    where: str
    registered: tuple[str, ...]
    watched: tuple[str, ...]


class LoopStatistics(msgspec.Struct, frozen=True):
    """Stalls and lag of the event loop, counted from the first served endpoint on, unless `TRD_WATCHDOG_S` is 0.

    Attributes:
        stalls: how often the loop was stuck for the watchdog's time or longer.
        stalled_s: duration of all stalls, in seconds.
        longest_s: duration of the longest stall, in seconds.
        lag: histogram of the loop's lag; see `observe.LoopStats`.
    """

    stalls: int
    stalled_s: float
    longest_s: float
    lag: tuple[int, ...]


class RuntimeStatistics(msgspec.Struct, frozen=True):
    """A runtime at one moment. Made by `runtime.statistics()`.

    Attributes:
        instance_id: the runtime's instance id.
        state: `open`, `draining` or `closed`.
        endpoints: the endpoints that it serves.
        calls: its calls, one entry for each called endpoint.
        sessions: its sessions with other runtimes; one session serves all endpoints of a worker.
        dialling: the number of sessions that are being made.
        received_bytes, sent_bytes: bytes of all sessions so far.
        held_bytes: bytes of clients' data, except small requests, that this worker holds in memory.
        held_limit_bytes: the limit of `held_bytes`, `TRD_MAX_HELD_BYTES`.
        shared_bytes: bytes of shared memory that this process holds for arrays and buffers that it sends.
        shared_limit_bytes: the limit of `shared_bytes`, `TRD_SHARED_MEMORY_BYTES`; 0 where there is no shared memory.
        subscriptions: its subscriptions to events.
        queues: its open consumers of work queues.
        threads: the threads of plain handlers.
        discovery: the discovery in which its instances are registered.
        loop: its event loop.
        tasks: the number of tasks that it runs for calls and clients.
        status_port: the URL of its status port, or why the port could not be opened; empty if no setting asks for one.
    """

    instance_id: int
    state: str
    endpoints: tuple[EndpointStatistics, ...]
    calls: tuple[CallStatistics, ...]
    sessions: tuple[SessionStatistics, ...]
    dialling: int
    received_bytes: int
    sent_bytes: int
    held_bytes: int
    held_limit_bytes: int
    shared_bytes: int
    shared_limit_bytes: int
    subscriptions: tuple[SubscriptionStatistics, ...]
    queues: tuple[QueueStatistics, ...]
    threads: ThreadStatistics
    discovery: DiscoveryStatistics
    loop: LoopStatistics
    tasks: int
    status_port: str = ""


def of_endpoint(endpoint: ServedEndpoint) -> EndpointStatistics:
    """The statistics of a served endpoint."""
    gate, queue = endpoint.gate, endpoint.gate.queue
    endpoint.stats.count()
    states = Counter(each.state for each in gate.running)
    states[RequestState.WAITING] = len(queue)
    return EndpointStatistics(
        name=endpoint.name.path,
        state=endpoint.state,
        addresses=endpoint.instance.addresses,
        listed=endpoint.listed,
        running=len(gate.running),
        waiting=len(queue),
        requests={each.name.lower(): states[each] for each in RequestState if each is not RequestState.OVER},
        max_inflight=queue.max_inflight,
        max_queue=queue.max_queue,
        mean_s=queue.mean_s,
        items=endpoint.stats.items,
        outcomes=endpoint.stats.outcomes(),
        duration=_of_histograms([endpoint.stats.duration]),
        first_item=_of_histograms([endpoint.stats.first_item]),
        queue_wait=_of_histograms([endpoint.stats.queue_wait]),
        loop_wait=_of_histograms([endpoint.stats.loop_wait]),
    )


def _of_histograms(histograms: Sequence[Histogram]) -> HistogramStatistics:
    """The sum of some histograms."""
    counts = [each.counts for each in histograms] or [Histogram().counts]
    return HistogramStatistics(tuple(map(sum, zip(*counts, strict=True))), sum(each.total_s for each in histograms))


def of_calls(called: Mapping[EndpointName, Candidates], clients: Clients) -> tuple[CallStatistics, ...]:
    """The statistics of all endpoints that are called."""
    alive = Counter(client.name for client in clients)
    return tuple(
        _of_calls(candidates, alive[name], list(clients.totals.parts(name))) for name, candidates in called.items()
    )


def _of_calls(candidates: Candidates, clients: int, stats: list[CallStats]) -> CallStatistics:
    outcomes = Counter(dict.fromkeys((each.name.lower() for each in Outcome), 0))
    for each in stats:
        each.count()
        outcomes.update(each.outcomes())
    return CallStatistics(
        name=candidates.name.path,
        clients=clients,
        open=sum(each.inflight for each in stats),
        outcomes=dict(outcomes),
        instances=tuple(each.id for each in candidates.table.instances),
        candidates=tuple(each.id for each in candidates.instances),
        out_of_rotation={id: down.failures for id, down in candidates.rotation.down.items()},
        ejected=candidates.ejector.stats.out,
        ejections=candidates.ejector.stats.ejections,
        load=candidates.load.open(),
        duration=_of_histograms([each.duration for each in stats]),
        first_item=_of_histograms([each.first_item for each in stats]),
        retries=sum(each.retries for each in stats),
        resumes=sum(each.resumes for each in stats),
        hedges=sum(each.hedges for each in stats),
    )


def of_session(session: Session, role: str) -> SessionStatistics:
    """The statistics of a session."""
    streams = session.streams.values()
    queued = sum(map(len, session.connection.out)) + sum(len(item) for stream in streams for item in stream.outbox)
    return SessionStatistics(
        address=session.address,
        role=role,
        phase=session.phase.name.lower(),
        silent=session.silent,
        paused=session.paused,
        streams=len(streams),
        blocked=sum(stream.credit <= 0 for stream in streams),
        queued_bytes=queued,
        waiting=len(session.waiters),
        unread_messages=sum(len(stream.inbox) for stream in streams),
        incomplete_bytes=session.connection.incomplete_bytes,
        window_bytes=session.connection.budget.promised,
        window_limit_bytes=session.connection.budget.total,
    )


def of_sessions(dialled: Iterable[Session], accepted: Iterable[Session]) -> tuple[SessionStatistics, ...]:
    """The statistics of all sessions."""
    return (
        *(of_session(each, "dialled") for each in dialled),
        *(of_session(each, "accepted") for each in accepted),
    )


def of_subscription(inbox: Inbox) -> SubscriptionStatistics:
    """The statistics of a subscription."""
    return SubscriptionStatistics(inbox.subject, inbox.waiting, inbox.waiting_bytes, inbox.dropped)


def of_queue(pull: PulledMessages) -> QueueStatistics:
    """The statistics of a consumer of a work queue."""
    return QueueStatistics(pull.title, pull.ready, pull.requested)


def of_threads(pool: HandlerThreads) -> ThreadStatistics:
    """The statistics of the threads of plain handlers."""
    return ThreadStatistics(pool.most, *pool.counts())


def of_loop(stats: LoopStats) -> LoopStatistics:
    """The statistics of the event loop."""
    return LoopStatistics(stats.stalls, stats.stalled_s, stats.longest_s, tuple(stats.lag))
