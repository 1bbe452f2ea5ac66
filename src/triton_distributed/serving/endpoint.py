"""One endpoint that this runtime serves: its handler, its requests, and the log of what its handler raises."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable
from typing import Any

from triton_distributed.context import Context
from triton_distributed.names import EndpointName, Instance
from triton_distributed.observe import Outcome, Stats
from triton_distributed.payload.exceptions import let_through
from triton_distributed.quiet import Quiet
from triton_distributed.serving.admission import HandlerSlots
from triton_distributed.serving.gate import Gate
from triton_distributed.serving.handlers import Handler
from triton_distributed.serving.lingering import Lingering
from triton_distributed.serving.reporting import log_error
from triton_distributed.serving.request import ServedRequest

logger = logging.getLogger("triton_distributed.runtime")

QUIET_S = 10.0
"""Seconds between two log entries for errors of one type: a handler that always fails must not fill a disk."""

MOST_WORDS = 300
"""Characters of an error's text in a line of the log."""

CUT_S = 2.0
"""Seconds that handlers have for their clean-up when a shutdown cancels them. Then the runtime goes on without them."""


class ServedEndpoint:
    """An endpoint, its handler, and the requests that are here.

    Args:
        loop: the running loop.
        name: of the endpoint.
        handler: what serves it.
        instance: what is registered.
        slots: handlers that the worker may run, shared by its endpoints.
        max_inflight: handlers that may run at once; None for as many as sessions may bring.
        max_queue: requests that may wait for one of them; beyond that a request is refused at once.
        graceful: True lets running requests finish in a drain; False cancels them at once.
        on_wait: called when a request begins to wait.
        on_exit: called where a handler has raised SystemExit.
        full_tracebacks: tracebacks of handlers' errors keep the frames of this package.

    Attributes:
        gate: which requests may begin, and those that wait and run.
        task: completes when the endpoint is not served any more; its cancellation cancels the handlers.
        lingering: requests whose handlers were cancelled and have not ended.
        context: the `contextvars` context of which each handler begins in a copy.
        registered: discovery has accepted it; it may have been paused since.
        listed: the addresses under which discovery lists it now; empty where it does not list it.
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
        on_wait: Callable[[], None],
        on_exit: Callable[[SystemExit], None],
        full_tracebacks: bool,
    ) -> None:
        self.loop = loop
        self.name = name
        self.handler = handler
        self.instance = instance
        self.stats = Stats()
        self.gate: Gate[ServedRequest] = Gate(loop, slots, self.stats, max_inflight, max_queue, on_wait)
        self.registered = False
        self.listed: tuple[str, ...] = ()
        self.graceful, self.on_exit = graceful, on_exit
        self.full_tracebacks = full_tracebacks
        self.lingering = Lingering(loop, name, handler.name)
        self.task: asyncio.Task[Any] | None = None
        self.context = contextvars.copy_context()
        self._reported = Quiet(QUIET_S, loop.time)  # by type of error

    @property
    def cancelled(self) -> bool:
        """Whether the program has cancelled the task that serves the endpoint, e.g. because its loop ends."""
        return self.task is not None and self.task.cancelling() > 0

    def report(self, context: Context, error: BaseException) -> None:
        """Log what a handler raised: at most once in `QUIET_S` for each type of error, with the number of the others.

        The traceback is logged in the worker where the error arose. A handler that passes on the error of its own call
        is logged with one line.
        """
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

    async def cut(self) -> list[str]:
        """Cancel what still runs and wait for it, at most `CUT_S`; returns the ids of those requests.

        Requests whose handlers have not begun are refused, so that they go elsewhere. Handlers that run on after that
        are in `lingering`.
        """
        running = list(self.gate.running)
        for request in running:
            request.cancel(Outcome.CANCELLED)
        cut = {each.task: each.context.id() for each in running if each.task is not None}
        if cut:
            await asyncio.wait(cut, timeout=CUT_S)
        return list(cut.values())
