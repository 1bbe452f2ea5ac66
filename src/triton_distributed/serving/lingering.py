"""Handlers that go on after their cancellation: the log says which, and where each one stands."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from triton_distributed.names import EndpointName
from triton_distributed.system.current_line import standing

if TYPE_CHECKING:
    from triton_distributed.serving.request import Serving

logger = logging.getLogger("triton_distributed.runtime")

LINGER_S = 10.0
"""Seconds after which a handler that was cancelled and still runs is reported: clean-up seldom takes that long."""

MOST_REPORTED = 20
"""Handlers reported at one look: a burst of stuck requests must not flood the log."""


class Lingering:
    """The requests of one endpoint that were cancelled and whose handlers have not ended yet.

    Args:
        loop: the running loop.
        name: the endpoint.
        handler: the name of its handler.

    Attributes:
        requests: each with the time of its cancellation, on the loop's clock; bounded by the requests that run.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, name: EndpointName, handler: str) -> None:
        self._loop = loop
        self._name = name
        self._handler = handler
        self._timer: asyncio.TimerHandle | None = None
        self._reported: set[Serving] = set()
        self.requests: dict[Serving, float] = {}

    def watch(self, serving: Serving) -> None:
        """The handler of `serving` was cancelled."""
        self.requests[serving] = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(LINGER_S, self._look)

    def ended(self, serving: Serving) -> None:
        """The handler of `serving` has ended."""
        self.requests.pop(serving, None)
        self._reported.discard(serving)
        if not self.requests and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def describe(self) -> list[str]:
        """Name each of the requests, its endpoint, and the line where its handler stands."""
        return [self._describe(serving) for serving in self.requests]

    def close(self) -> None:
        """Report nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _describe(self, serving: Serving) -> str:
        where = standing(serving.task, serving.items)
        return f"request {serving.context.id()} of {self._name}: handler {self._handler} stands at {where}"

    def _look(self) -> None:
        now = self._loop.time()
        due = [each for each, since in self.requests.items() if now - since >= LINGER_S and each not in self._reported]
        for serving in due[:MOST_REPORTED]:
            logger.warning(
                "%s, %.0f s after its cancellation: it keeps its place until it ends",
                self._describe(serving),
                now - self.requests[serving],
            )
        if len(due) > MOST_REPORTED:
            logger.warning("%s: %d more handlers run on after their cancellation", self._name, len(due) - MOST_REPORTED)
        self._reported.update(due)
        later = [since for each, since in self.requests.items() if each not in self._reported]
        self._timer = self._loop.call_at(min(later) + LINGER_S, self._look) if later else None
