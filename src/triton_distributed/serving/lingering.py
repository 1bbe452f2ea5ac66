"""Handlers that still run after their cancellation: the log names each one and its current line."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol

from triton_distributed.context import Context
from triton_distributed.names import EndpointName
from triton_distributed.system.current_line import standing

logger = logging.getLogger("triton_distributed.runtime")

LINGER_S = 10.0
"""Seconds after which a cancelled handler that still runs is reported. Clean-up seldom takes that long."""

MOST_REPORTED = 20
"""The largest number of handlers reported by one check. Many stuck requests must not flood the log."""


class Cancelled(Protocol):
    """A request whose handler was cancelled; see `serving.request.ServedRequest`."""

    task: asyncio.Task[None] | None

    @property
    def items(self) -> Any: ...

    @property
    def context(self) -> Context: ...


class Lingering:
    """The requests of one endpoint that were cancelled and whose handlers have not ended yet.

    Args:
        loop: the running loop.
        name: the endpoint.
        handler: the name of its handler.

    Attributes:
        requests: each request with the time of its cancellation, on the loop's clock; bounded by the running requests.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, name: EndpointName, handler: str) -> None:
        self._loop = loop
        self._name = name
        self._handler = handler
        self._timer: asyncio.TimerHandle | None = None
        self._reported: set[Cancelled] = set()
        self.requests: dict[Cancelled, float] = {}

    def watch(self, request: Cancelled) -> None:
        """Watch a request whose handler was cancelled."""
        self.requests[request] = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(LINGER_S, self._check)

    def ended(self, request: Cancelled) -> None:
        """Forget a request whose handler has ended."""
        self.requests.pop(request, None)
        self._reported.discard(request)
        if not self.requests and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def describe(self) -> list[str]:
        """Name each request, its endpoint, and the current line of its handler."""
        return [self._describe(request) for request in self.requests]

    def close(self) -> None:
        """Stop reporting."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _describe(self, request: Cancelled) -> str:
        where = standing(request.task, request.items)
        return f"request {request.context.id()} of {self._name}: handler {self._handler} stands at {where}"

    def _check(self) -> None:
        now = self._loop.time()
        due = [each for each, since in self.requests.items() if now - since >= LINGER_S and each not in self._reported]
        for request in due[:MOST_REPORTED]:
            logger.warning(
                "%s, %.0f s after its cancellation: it keeps its place until it ends",
                self._describe(request),
                now - self.requests[request],
            )
        if len(due) > MOST_REPORTED:
            logger.warning("%s: %d more handlers run on after their cancellation", self._name, len(due) - MOST_REPORTED)
        self._reported.update(due)
        later = [since for each, since in self.requests.items() if each not in self._reported]
        self._timer = self._loop.call_at(min(later) + LINGER_S, self._check) if later else None
