"""Requests that wait for each other: full endpoints of one worker whose handlers wait for these same endpoints."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from triton_distributed.names import EndpointName
from triton_distributed.runtime.call import Call
from triton_distributed.runtime.threads import SAID_AGAIN_S, STUCK_S

if TYPE_CHECKING:
    from triton_distributed.runtime.served import ServedEndpoint
    from triton_distributed.runtime.serving import Serving

logger = logging.getLogger("triton_distributed.runtime")

STANDS_S = 0.9 * STUCK_S  # the loop's timers are not exact


class Standstill:
    """Says so where the endpoints of a worker wait for each other. It costs nothing while no request waits.

    Args:
        loop: the running loop.
        endpoints: returns what the worker serves.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, endpoints: Callable[[], Iterable[ServedEndpoint]]) -> None:
        self._loop = loop
        self._endpoints = endpoints
        self._timer: asyncio.TimerHandle | None = None  # set while a request waits
        self._said = False  # of the standstill that lasts
        self._said_at = float("-inf")

    def waits(self) -> None:
        """A request waits in front of a full endpoint."""
        if self._timer is None:
            self._timer = self._loop.call_later(STUCK_S, self._look)

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        endpoints = list(self._endpoints())
        self._timer = None
        if any(len(each.admission) for each in endpoints):
            self.waits()
        now = self._loop.time()
        stuck = _stuck(endpoints, now)
        if not stuck:
            self._said = False
        elif not self._said and now - self._said_at >= SAID_AGAIN_S:
            self._said, self._said_at = True, now
            logger.warning(
                "requests of this worker wait for each other, and only their deadlines end that: %s. Raise "
                "max_inflight=, or call another worker",
                " | ".join(_words(each, stuck, now) for each in stuck.values()),
            )


def _stuck(endpoints: Iterable[ServedEndpoint], now: float) -> dict[EndpointName, ServedEndpoint]:
    """The full endpoints each of whose handlers waits for one of them.

    A handler that only takes long does not wait for any of them, so its endpoint goes on some time.
    """
    found = {each.name: each for each in endpoints if len(each.admission) and _stands_s(each, now) >= STANDS_S}
    while moving := [each for each in found.values() if not all(_targets(one, found) for one in each.running)]:
        for each in moving:
            del found[each.name]
    return found


def _stands_s(endpoint: ServedEndpoint, now: float) -> float:
    """Seconds since a handler began there: while requests wait, one begins whenever one ends."""
    newest = next(reversed(endpoint.running), None)
    return 0.0 if newest is None else now - newest.started


def _targets(serving: Serving, endpoints: Mapping[EndpointName, ServedEndpoint]) -> set[EndpointName]:
    """Those of the endpoints that a handler has called and that have not answered it."""
    found = set()
    for call in serving.context._calls or ():
        if not isinstance(call, Call) or call.towards is None:
            continue
        endpoint = endpoints.get(call.client.view.name)
        # Other workers may serve an endpoint of this name: only what was sent to this one waits here.
        if endpoint is not None and call.towards.id == endpoint.instance.id:
            found.add(endpoint.name)
    return found


def _words(endpoint: ServedEndpoint, stuck: Mapping[EndpointName, ServedEndpoint], now: float) -> str:
    targets = {name for serving in endpoint.running for name in _targets(serving, stuck)}
    return (
        f"{endpoint.name} is full with max_inflight={endpoint.admission.max_inflight}, and its handler "
        f"{endpoint.handler.name} waits for calls to {', '.join(sorted(map(str, targets)))}; {len(endpoint.admission)} "
        f"waiting, none begun for {_stands_s(endpoint, now):.1f} s"
    )
