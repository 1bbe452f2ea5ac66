"""Which requests of one endpoint may begin: at once, after waiting, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Final, Generic, TypeVar

from triton_distributed.observe import Outcome, Stats
from triton_distributed.serving.admission import Admission, HandlerSlots
from triton_distributed.serving.handler_context import ServedContext
from triton_distributed.serving.state import ANNOUNCED
from triton_distributed.transport.stream import Owner, Stream
from triton_distributed.wire.frames import RejectCode, overloaded

INFINITE: Final = float("inf")
_DRAINING = (RejectCode.DRAINING, b"it is shutting down")
_PAUSED = (RejectCode.PAUSED, b"it was paused by its program, see Endpoint.pause")
_CUT_SHORT = (Outcome.CANCELLED, Outcome.LOST, Outcome.DEADLINE, Outcome.CUT)


class Applicant(Owner):
    """The part of a request that the gate uses; see `serving.request.ServedRequest`."""

    __slots__ = ("came", "context", "due", "outcome", "queued_s", "started", "state", "stream")

    stream: Stream
    context: ServedContext
    state: int
    outcome: Outcome
    came: float
    queued_s: float
    started: float
    due: float

    def watch_deadline(self, deadline: float) -> None:
        raise NotImplementedError

    def expire(self) -> None:
        raise NotImplementedError

    def refuse(self, code: int, detail: bytes) -> None:
        raise NotImplementedError

    def begin(self) -> None:
        raise NotImplementedError


R = TypeVar("R", bound=Applicant)


class Gate(Generic[R]):
    """Admits the requests of one endpoint, within its limits and those of the worker.

    Args:
        loop: the running loop.
        slots: handlers that the worker may run, shared by its endpoints.
        stats: counters of the endpoint.
        max_inflight: handlers that may run at once; None for no limit of the endpoint's own.
        max_queue: requests that may wait for a place; further requests are refused at once.
        on_wait: called when a request begins to wait.

    Attributes:
        queue: the waiting requests, and estimates of how long they wait.
        running: the admitted requests, in the order in which they were admitted.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        slots: HandlerSlots,
        stats: Stats,
        max_inflight: int | None,
        max_queue: int,
        on_wait: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._slots = slots
        self._stats = stats
        self._on_wait = on_wait
        self._refusal: tuple[RejectCode, bytes] | None = None  # The answer to new requests while the gate is closed.
        self._idle: asyncio.Future[None] | None = None
        self.queue: Admission[R] = Admission(max_inflight, max_queue)
        self.running: dict[R, None] = {}

    def admit(self, request: R, timeout_s: float) -> None:
        """Start a request, queue it, or refuse it.

        Args:
            timeout_s: seconds until its deadline; infinite if it has none.
        """
        if self._refusal is not None:
            request.refuse(*self._refusal)
            return
        slots, streams = self._slots, request.stream.session.connection.streams
        if len(streams) > slots.most - slots.taken:
            request.refuse(RejectCode.OVERLOADED, overloaded(slots.refusal(len(streams))))
            return
        if timeout_s != INFINITE:
            if not timeout_s > 0:
                request.expire()
                return
            request.watch_deadline(self._loop.time() + timeout_s)
        limit = self.queue.max_inflight
        if limit is None or len(self.running) < limit:
            self._start(request)
        else:
            self._let_wait(request, timeout_s)

    def _let_wait(self, request: R, timeout_s: float) -> None:
        queue, priority = self.queue, request.context.priority
        wait_s = queue.wait_s(priority)
        if not queue.in_time(priority, timeout_s):
            words = (
                f"it would wait about {wait_s:.3g} s and take {queue.mean_s:.3g} s, "
                f"and its deadline is in {timeout_s:.3g} s"
            )
            self._refuse(request, words)
            return
        if queue.mean_s:
            request.due = self._loop.time() + wait_s + queue.mean_s
        evicted = queue.enter(request, priority)
        if evicted is not request:
            self._on_wait()
        if evicted is not None:
            oldest_s = self._loop.time() - next(iter(self.running)).started
            words = (
                f"{len(self.running)} requests run, the oldest for {oldest_s:.3g} s, and {len(queue)} wait: the limits "
                f"are max_inflight={queue.max_inflight}, max_queue={queue.max_queue}"
            )
            self._refuse(evicted, words)

    def _refuse(self, request: R, words: str) -> None:
        """Refuse a request because the endpoint is at capacity, with a hint of when to try again."""
        hint_s = self.queue.retry_after_s(request.context.priority, self.running, self._loop.time())
        request.refuse(RejectCode.OVERLOADED, overloaded(words, hint_s))

    def _start(self, request: R) -> None:
        """Announce to the caller that the handler begins; the handler begins in a later turn of the loop."""
        self.running[request] = None
        self._slots.taken += 1
        self._stats.inflight += 1
        queue = self.queue
        if queue.max_inflight is not None:
            request.started = self._loop.time()
            if queue.mean_s and not request.due:
                request.due = request.started + queue.mean_s
        request.state = ANNOUNCED
        request.stream.session.accept(request.stream, request.begin)

    def ended(self, request: R) -> None:
        """Count an admitted request that is over, and start the next one."""
        del self.running[request]
        self._slots.taken -= 1
        self._stats.inflight -= 1
        if request.started:
            self._learn(request)
        if self.queue.max_inflight is not None and self._refusal is None:
            self._start_next()
        if not self.running and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _start_next(self) -> None:
        """Start the next request of the queue. A request that would be late is refused in favour of the next one."""
        queue = self.queue
        while (request := queue.next()) is not None:
            deadline, now = request.context.deadline, self._loop.time()
            left_s = INFINITE if deadline is None else deadline - now
            if left_s >= queue.mean_s or not len(queue):
                request.queued_s = monotonic() - request.came
                self._start(request)
                return
            if request.due:  # The request would have ended at `now + mean_s` at the earliest.
                queue.ended(request.context.priority, now + queue.mean_s - request.due, whole=False)
            self._refuse(request, f"it has waited until {left_s:.3g} s are left, and would take {queue.mean_s:.3g} s")

    def left(self, request: R) -> None:
        """Remove a waiting request that was cancelled or has expired."""
        self.queue.leave(request, request.context.priority)
        self._learn(request)

    def _learn(self, request: R) -> None:
        """Compare the time that a request has taken with its estimate."""
        now, whole = self._loop.time(), request.outcome not in _CUT_SHORT
        if request.started:
            self.queue.took(now - request.started, whole)
        if request.due:
            self.queue.ended(request.context.priority, now - request.due, whole)

    @property
    def draining(self) -> bool:
        """Whether the gate was closed for good."""
        return self._refusal == _DRAINING

    @property
    def paused(self) -> bool:
        """Whether the gate is closed until `resume`."""
        return self._refusal == _PAUSED

    def drain(self) -> None:
        """Admit no more requests. Waiting requests are refused, so that clients send them elsewhere; running ones
        continue."""
        self._refusal = _DRAINING
        self._refuse_waiting(_DRAINING)

    def pause(self) -> None:
        """Admit no requests until `resume`. Waiting requests are refused, so that clients send them elsewhere."""
        if self._refusal is None:
            self._refusal = _PAUSED
            self._refuse_waiting(_PAUSED)

    def resume(self) -> None:
        """Admit requests again, unless the gate drains."""
        if self.paused:
            self._refusal = None

    def _refuse_waiting(self, refusal: tuple[RejectCode, bytes]) -> None:
        for request in self.queue.clear():
            request.refuse(*refusal)

    async def idle(self) -> None:
        """Wait until no request runs. Only one task may wait at a time."""
        while self.running:
            self._idle = self._loop.create_future()
            await self._idle
