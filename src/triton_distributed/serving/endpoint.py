"""One endpoint that this runtime serves: its handler, its requests, and the log of what its handler raises."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from triton_distributed.context import Context, ServedBy, served_by
from triton_distributed.names import EndpointName, Instance
from triton_distributed.observe import Outcome, RequestStats
from triton_distributed.observe.labels import Labels
from triton_distributed.observe.observer import Observers
from triton_distributed.payload.exceptions import let_through
from triton_distributed.quiet import Quiet
from triton_distributed.serving.admission import HandlerSlots
from triton_distributed.serving.gate import Gate
from triton_distributed.serving.handlers import Handler
from triton_distributed.serving.lingering import Lingering
from triton_distributed.serving.reporting import log_error
from triton_distributed.serving.request import Host, ServedRequest

logger = logging.getLogger("triton_distributed.runtime")

QUIET_S = 10.0
"""Seconds between two log entries for errors of one type. A handler that always fails must not fill a disk."""

MOST_WORDS = 300
"""The largest number of characters of an error's text in a line of the log."""

TIMES_FROM_S = 0.005
"""A request that took less time is not worth its times on the wire, see `StreamCore.times`."""

CUT_S = 2.0
"""Seconds for the clean-up of handlers that a shutdown cancels. After them the runtime no longer waits for handlers."""


current_endpoint: contextvars.ContextVar[ServedEndpoint | None] = contextvars.ContextVar(
    "triton_distributed_current_endpoint", default=None
)
"""The endpoint whose handler runs here; None outside of handlers."""


class ServedEndpoint(Host):
    """An endpoint, its handler, and the requests that it has received.

    Args:
        loop: the running loop.
        name: the endpoint's name.
        handler: the handler that serves it.
        instance: the instance to register.
        slots: handlers that the worker may run, shared by its endpoints.
        max_inflight: handlers that may run at once; None for no limit of the endpoint's own.
        max_queue: requests that may wait for a place; further requests are refused at once.
        graceful: True lets running requests finish in a drain; False cancels them at once.
        interrupt: running handlers are cancelled when their caller leaves or their deadline is over.
        on_wait: called when a request begins to wait.
        on_exit: called when a handler has raised SystemExit.
        full_tracebacks: tracebacks of handlers' errors keep the frames of this package.
        observers: the observers of its requests.
        labels: the program's labels for the endpoint's metrics.

    Attributes:
        gate: decides which requests may begin; holds the waiting and the running requests.
        task: completes when the endpoint is not served any more; its cancellation cancels the handlers.
        lingering: requests whose handlers were cancelled and have not ended.
        context: the `contextvars` context; each handler begins in a copy of it.
        kept: what decorators of handlers keep for this endpoint, by keys of their own.
        times_from_s: seconds from which on the times of a request are sent.
        registered: discovery has accepted the endpoint; it may have been paused since.
        canary: the request with which the status port tries the handler; UNSET for none.
        listed: the addresses under which discovery lists the endpoint now; empty if it is not listed.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        name: EndpointName,
        handler: Handler,
        instance: Instance,
        slots: HandlerSlots,
        *,
        max_inflight: int | None,
        max_queue: int,
        graceful: bool,
        interrupt: bool,
        on_wait: Callable[[], None],
        on_exit: Callable[[SystemExit], None],
        full_tracebacks: bool,
        observers: Observers,
        labels: Labels,
    ) -> None:
        self.loop = loop
        self.name = name
        self.handler = handler
        self.instance = instance
        self.stats = RequestStats()
        self.gate: Gate[ServedRequest] = Gate(loop, slots, self.stats, max_inflight, max_queue, on_wait)
        self.registered = False
        self.listed: tuple[str, ...] = ()
        self.canary: Any = msgspec.UNSET
        self.graceful, self.interrupt, self.on_exit = graceful, interrupt, on_exit
        self.full_tracebacks, self.labels = full_tracebacks, labels
        self.times_from_s = TIMES_FROM_S
        self.observers = observers
        self.lingering = Lingering(loop, name, handler.name)
        self.task: asyncio.Task[Any] | None = None
        self.context = contextvars.copy_context()
        self.context.run(served_by.set, ServedBy(str(name), instance.id))
        self.context.run(current_endpoint.set, self)
        self.kept: dict[Any, Any] = {}
        self._reported = Quiet(QUIET_S, loop.time)  # The keys are types of errors.

    @property
    def state(self) -> str:
        """`starting` (discovery has not accepted it yet), `serving`, `paused` or `draining`."""
        if self.gate.draining:
            return "draining"
        if self.gate.paused:
            return "paused"
        return "serving" if self.registered else "starting"

    @property
    def cancelled(self) -> bool:
        """Whether the program has cancelled the task that serves the endpoint, for example because its loop ends."""
        return self.task is not None and self.task.cancelling() > 0

    def report(self, context: Context, error: BaseException) -> None:
        """Log a handler's error: at most once in `QUIET_S` for each type, with the number of suppressed ones.

        The traceback is logged only by the worker in which the error arose. An error that a handler passes on from its
        own call is logged as one line. So is one whose class says that it is the caller's fault (`callers_fault`), at
        the level INFO: invalid requests must not fill the log of the worker.
        """
        if getattr(type(error), "callers_fault", False):
            if logger.isEnabledFor(logging.INFO):
                words = " ".join(str(error).split())[:MOST_WORDS]
                logger.info("%s: request %s: an invalid request: %s", self.name, context.id(), words)
            return
        through = let_through(error)
        suppressed = self._reported.due(through.type_name if through else type(error).__qualname__)
        level = logging.DEBUG if suppressed is None else logging.WARNING
        more = f" ({suppressed} more like it since the last report)" if suppressed else ""
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

    def report_refusal(self, context: Context, words: str) -> None:
        """Log that a request was refused because the endpoint or the worker is at capacity, once in `QUIET_S`."""
        if (suppressed := self._reported.due("at capacity")) is not None:
            more = f" ({suppressed} more refused since the last report)" if suppressed else ""
            text = "%s: request %s: refused, at capacity: %s%s"
            logger.warning(text, self.name, context.id(), words, more, extra=self.log_fields(context))

    def log_fields(self, context: Context) -> dict[str, str]:
        """The fields of the log for one of its requests, outside of the request's handler; see `LogContext`."""
        return {"request_id": context.id(), "endpoint": str(self.name), "instance_id": str(self.instance.id)}

    async def cut(self) -> list[str]:
        """Cancel the running requests and wait for them, at most `CUT_S`; return their ids.

        Requests whose handlers have not begun are refused, so that clients send them elsewhere. Handlers that still run
        after the wait are in `lingering`.
        """
        running = list(self.gate.running)
        for request in running:
            request.cancel(Outcome.CUT)
        cut = {each.task: each.context.id() for each in running if each.task is not None}
        if cut:
            await asyncio.wait(cut, timeout=CUT_S)
        return list(cut.values())
