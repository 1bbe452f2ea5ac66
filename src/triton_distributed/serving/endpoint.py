"""One endpoint that this runtime serves: who is let in, who waits, who runs."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from triton_distributed.context import Context
from triton_distributed.errors import DecodeError
from triton_distributed.names import EndpointName, Instance
from triton_distributed.observe import Outcome, Stats
from triton_distributed.payload.exceptions import let_through
from triton_distributed.serving.admission import Admission, Places
from triton_distributed.serving.handler_context import ServedContext, served_context
from triton_distributed.serving.handlers import Handler
from triton_distributed.serving.lingering import Lingering
from triton_distributed.serving.reporting import log_error
from triton_distributed.serving.request import Serving
from triton_distributed.serving.standstill import Standstill
from triton_distributed.transport.stream import Stream
from triton_distributed.wire.assembly import Body, Memory
from triton_distributed.wire.frames import MOST_ITEMS, RejectCode, array_length, overloaded

_INFINITE = float("inf")
logger = logging.getLogger("triton_distributed.runtime")

QUIET_S = 10.0  # a handler that fails at every request must not fill a disk
MOST_KINDS = 64  # types of errors that are remembered
MOST_WORDS = 300  # characters of an error's text in a line of the log
_DRAINING = (RejectCode.DRAINING, b"it is shutting down")
_PAUSED = (RejectCode.PAUSED, b"it was paused by its program, see Endpoint.pause")
_CUT_SHORT = (Outcome.CANCELLED, Outcome.LOST, Outcome.DEADLINE)
CUT_S = 2.0
"""Seconds that handlers have for their clean-up when a shutdown cuts them, before the runtime goes on without them."""
_split = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode


class ServedEndpoint:
    """An endpoint, its handler, and the requests that are here.

    Args:
        loop: the running loop.
        name: of the endpoint.
        handler: what serves it.
        places: of the worker, shared by its endpoints.
        max_inflight: handlers that may run at once; None for as many as sessions may bring.
        max_queue: requests that may wait for one of them; beyond it they are refused at once.
        graceful: a drain lets what runs finish; else it is cut at once.
        standstill: of the worker, told when a request has to wait.
        on_exit: called where a handler has raised SystemExit.
        full_tracebacks: tracebacks of handlers' errors keep the frames of this package.

    Attributes:
        instance: what is registered.
        admission: who waits.
        running: the requests whose handlers run, in the order in which they were let in.
        task: completes when the endpoint is not served any more; its cancellation cancels the handlers.
        lingering: requests whose handlers were cancelled and have not ended.
        draining, paused: no further request is let in.
        registered: discovery has taken it in; it may have been paused since.
        listed: the addresses under which discovery lists it now; none where it lists it not.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        name: EndpointName,
        handler: Handler,
        instance: Instance,
        places: Places,
        *,
        max_inflight: int | None,
        max_queue: int,
        graceful: bool,
        standstill: Standstill,
        on_exit: Callable[[SystemExit], None],
        full_tracebacks: bool,
    ) -> None:
        self.loop = loop
        self.name = name
        self.handler = handler
        self.instance = instance
        self.admission = Admission(max_inflight, max_queue)
        self.draining = self.paused = self.registered = False
        self.listed: tuple[str, ...] = ()
        self.graceful, self.on_exit = graceful, on_exit
        self.full_tracebacks = full_tracebacks
        self._places = places
        self._standstill = standstill
        self.running: dict[Serving, None] = {}
        self.lingering = Lingering(loop, name, handler.name)
        self.task: asyncio.Task[Any] | None = None
        self.stats = Stats()
        self._reported: dict[str, tuple[float, int]] = {}  # type of error → when it was logged, how many since
        self.context = contextvars.copy_context()  # every handler begins in a copy of it
        self._idle: asyncio.Future[None] | None = None

    def admit(self, stream: Stream, timeout_s: float, metadata: Body, body: Body, buffers: list[Memory] | None) -> None:
        """Let a request in, let it wait, or refuse it."""
        context = served_context(stream, metadata) if metadata else ServedContext(stream)
        serving = Serving(self, stream, context, body, buffers)
        if self.draining or self.paused:
            serving.refuse(*(_DRAINING if self.draining else _PAUSED))
            return
        places, streams = self._places, stream.connection.streams
        if len(streams) > places.most - places.taken:
            serving.refuse(RejectCode.OVERLOADED, overloaded(places.refusal(len(streams))))
            return
        if timeout_s != _INFINITE:
            if not timeout_s > 0:
                serving.expire()
                return
            context.deadline = context.calls_deadline = self.loop.time() + timeout_s
            serving.watch_deadline(self.loop, context.deadline)
        limit = self.admission.max_inflight
        if limit is None or len(self.running) < limit:
            self._start(serving)
        else:
            self._let_wait(serving, timeout_s)

    def _let_wait(self, serving: Serving, timeout_s: float) -> None:
        admission, priority = self.admission, serving.context.priority
        wait_s = admission.wait_s(priority)
        if not admission.in_time(priority, timeout_s):
            words = (
                f"it would wait about {wait_s:.3g} s and take {admission.mean_s:.3g} s, "
                f"and its deadline is in {timeout_s:.3g} s"
            )
            self._refuse(serving, words)
            return
        if admission.mean_s:
            serving.due = self.loop.time() + wait_s + admission.mean_s
        cut = admission.enter(serving, priority)
        if cut is not serving:
            self._standstill.waits()
        if cut is not None:
            oldest_s = self.loop.time() - next(iter(self.running)).started
            words = (
                f"{len(self.running)} requests run, the oldest for {oldest_s:.3g} s, and {len(admission)} wait, which "
                f"is all it takes: max_inflight={admission.max_inflight}, max_queue={admission.max_queue}"
            )
            self._refuse(cut, words)

    def _refuse(self, serving: Serving, words: str) -> None:
        """Refuse a request for which there is no place, and say when there will be one."""
        hint_s = self.admission.retry_after_s(serving.context.priority, self.running, self.loop.time())
        serving.refuse(RejectCode.OVERLOADED, overloaded(words, hint_s))

    def _start(self, serving: Serving) -> None:
        """Tell the caller that the handler begins, then let it begin in a later step of the loop."""
        self.running[serving] = None
        self._places.taken += 1
        self.stats.inflight += 1
        admission = self.admission
        if admission.max_inflight is not None:
            serving.started = self.loop.time()
            if admission.mean_s and not serving.due:
                serving.due = serving.started + admission.mean_s
        serving.admitted = True
        serving.stream.connection.accept(serving.stream, serving.begin)

    def finished(self, serving: Serving) -> None:
        """A handler has ended: the next in the queue may begin."""
        self.running.pop(serving, None)
        if self.lingering.requests:
            self.lingering.ended(serving)
        self._places.taken -= 1
        self.stats.inflight -= 1
        if serving.started:
            self._learn(serving)
        if self.admission.max_inflight is not None and not self.draining and not self.paused:
            self._let_in()
        if not self.running and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _let_in(self) -> None:
        """Start the next in the queue, where there is one; one that would be late is refused for the sake of others."""
        admission = self.admission
        while (waiting := admission.next()) is not None:
            left_s = waiting.left_s(self.loop)
            if left_s >= admission.mean_s or not len(admission):
                self._start(waiting)
                return
            priority = waiting.context.priority
            if waiting.due:  # it would have ended no sooner than that
                admission.ended(priority, self.loop.time() + admission.mean_s - waiting.due, whole=False)
            words = f"it has waited until {left_s:.3g} s are left, and would take {admission.mean_s:.3g} s"
            self._refuse(waiting, words)

    def left_queue(self, serving: Serving) -> None:
        """A request that waited was cancelled, or its time is over."""
        self.admission.leave(serving, serving.context.priority)
        self._learn(serving)

    def _learn(self, serving: Serving) -> None:
        """Compare a request that has ended with what was expected of it."""
        now, whole = self.loop.time(), serving.outcome not in _CUT_SHORT
        if serving.started:
            self.admission.took(now - serving.started, whole)
        if serving.due:
            self.admission.ended(serving.context.priority, now - serving.due, whole)

    @staticmethod
    def split(batch: Body) -> list[Any]:
        """The encoded items of a BATCH, to be decoded one by one against the handler's types.

        Raises:
            DecodeError: it is none, or has more than `MOST_ITEMS`: 262,000 of a byte each would take 25 MB.
        """
        if array_length(batch) > MOST_ITEMS:
            raise DecodeError(f"a batch of {array_length(batch):,} items, the limit is {MOST_ITEMS:,}")
        try:
            return _split(batch)
        except msgspec.DecodeError as error:
            raise DecodeError(f"a batch that is none: {error}") from error

    @property
    def cancelled(self) -> bool:
        """The program cancels the task that serves the endpoint, e.g. because its loop ends: handlers are cut."""
        return self.task is not None and self.task.cancelling() > 0

    def drain(self) -> None:
        """Let no request in any more; those that wait are refused, so that they go elsewhere; those that run go on."""
        self.draining = True
        self._refuse_waiting(_DRAINING)

    def pause(self) -> None:
        """Let no request in until `resume`; those that wait are refused, so that they go elsewhere."""
        self.paused = True
        self._refuse_waiting(_PAUSED)

    def resume(self) -> None:
        """Let requests in again."""
        self.paused = False

    def _refuse_waiting(self, refusal: tuple[RejectCode, bytes]) -> None:
        for serving in self.admission.clear():
            serving.refuse(*refusal)

    def report(self, context: Context, error: BaseException) -> None:
        """Log what a handler raised: once in `QUIET_S` for each type of error, with the number of the others.

        The traceback is logged where the error arose. A handler that lets the error of its own call through is logged
        with one line.
        """
        through = let_through(error)
        kind, now = through.type_name if through else type(error).__qualname__, self.loop.time()
        since, unsaid = self._reported.get(kind, (-QUIET_S, 0))
        level, more = logging.WARNING, f" ({unsaid} more like it since the last report)" if unsaid else ""
        if now - since < QUIET_S:
            self._reported[kind] = (since, unsaid + 1)
            level, more = logging.DEBUG, ""
        else:
            if len(self._reported) >= MOST_KINDS:
                self._reported.clear()
            self._reported[kind] = (now, 0)
        if not logger.isEnabledFor(level):
            return
        if through is None:
            text = "%s: request %s: the handler raised%s"
            log_error(logger, level, error, self.full_tracebacks, text, self.name, context.id(), more)
            return
        words = " ".join(through.words.split())
        place, request = through.hops[0]
        text = "%s: request %s: the handler passed on an error of instance %d, request %s: %s%s"
        logger.log(level, text, self.name, context.id(), place, request, words[:MOST_WORDS], more)

    async def idle(self) -> None:
        """Wait until no handler runs. One waiter at a time."""
        while self.running:
            self._idle = self.loop.create_future()
            await self._idle

    async def cut(self) -> list[str]:
        """Cancel what still runs and wait for it, at most `CUT_S`; returns the ids of those requests.

        Those whose handlers have not begun are refused, so that they go elsewhere. Those whose handlers run on after
        that are in `lingering`.
        """
        running = list(self.running)
        for serving in running:
            serving.cancel(Outcome.CANCELLED)
        cut = {each.task: each.context.id() for each in running if each.task is not None}
        if cut:
            await asyncio.wait(cut, timeout=CUT_S)
        return list(cut.values())
