"""Finds requests that wait for each other: handlers of full endpoints that call these same endpoints."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable, Container, Iterable, Iterator

from triton_distributed.context import AwaitedRequest, awaited_requests
from triton_distributed.names import EndpointName
from triton_distributed.serving.endpoint import ServedEndpoint
from triton_distributed.serving.request import ServedRequest
from triton_distributed.serving.state import WAITING
from triton_distributed.serving.threads import SAID_AGAIN_S, STUCK_S

logger = logging.getLogger("triton_distributed.runtime")

STANDS_S = 0.9 * STUCK_S
"""Seconds without a new handler after which an endpoint is stuck. It is below `STUCK_S`, as timers are not exact."""

_alive: weakref.WeakSet[Standstill] = weakref.WeakSet()  # A process may have several runtimes.


class Standstill:
    """Warns if endpoints of this process wait for each other. It costs nothing while no request waits.

    Args:
        loop: the running loop.
        endpoints: returns the endpoints that the runtime serves.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, endpoints: Callable[[], Iterable[ServedEndpoint]]) -> None:
        self._loop = loop
        self._endpoints = endpoints
        self._timer: asyncio.TimerHandle | None = None  # Set while a request waits.
        self._said = False  # The present standstill was logged.
        self._said_at = float("-inf")
        _alive.add(self)

    def waits(self) -> None:
        """Start checking: a request waits for a place at a full endpoint."""
        if self._timer is None:
            self._timer = self._loop.call_later(STUCK_S, self._check)

    def close(self) -> None:
        """Stop checking."""
        _alive.discard(self)
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        own = list(self._endpoints())
        self._timer = None
        if any(len(each.gate.queue) for each in own):
            self.waits()
        now = self._loop.time()
        stuck = Circle([each for one in _alive if one._loop is self._loop for each in one._endpoints()], now)
        if not any(each in own for each in stuck.full):
            self._said = False
        elif not self._said and now - self._said_at >= SAID_AGAIN_S:
            self._said, self._said_at = True, now
            # If several runtimes wait for each other, only the one with the first endpoint logs it.
            if min(stuck.full, key=_order) in own:
                logger.warning(
                    "requests of this process wait for each other, and only their deadlines end that: %s. Raise "
                    "max_inflight=, or call another process",
                    stuck.words(now),
                )


class Circle:
    """The requests of a process that cannot continue, because each waits for another one of them.

    A handler waits for the requests that it has sent and that are not answered. Such a request may run in a handler
    that waits itself, or it may be in the queue of a full endpoint. A slow handler waits for no request, so handlers
    that wait for it continue eventually.

    Attributes:
        full: the full endpoints whose queued requests can never begin.
    """

    def __init__(self, endpoints: Iterable[ServedEndpoint], now: float) -> None:
        self._endpoints = list(endpoints)
        instances = {(each.name, each.instance.id) for each in self._endpoints}
        self.full = [
            each
            for each in self._endpoints
            if len(each.gate.queue)
            and _stands_s(each, now) >= STANDS_S
            and all(any(_calls(one, instances)) for one in each.gate.running)
        ]
        self._targets: dict[ServedRequest, list[tuple[ServedEndpoint, ServedRequest]]] = {}  # Keys: waiting handlers.
        if not self.full:  # The usual case. The rest looks at every request.
            return
        requests = {}
        for endpoint in self._endpoints:
            for request in (*endpoint.gate.running, *endpoint.gate.queue.waiting()):
                peer = request.stream.session.connection.peer
                requests[peer.nonce if peer is not None else 0, request.stream.id] = endpoint, request
        for endpoint in self._endpoints:
            for request in endpoint.gate.running:
                sent = [each.sent for each in _calls(request, instances) if each.sent is not None]
                self._targets[request] = [requests[each] for each in sent if each in requests]
        self._reduce()

    def _reduce(self) -> None:
        """Remove the handlers and endpoints that can continue, until only those that cannot are left."""
        waiting, changed = self._targets, True
        while changed:
            free = [
                one
                for one, targets in waiting.items()
                if not any(
                    each in waiting if each.state != WAITING else endpoint in self.full for endpoint, each in targets
                )
            ]
            full = [each for each in self.full if all(one in waiting for one in each.gate.running)]
            changed = bool(free) or len(full) < len(self.full)
            self.full = full
            for one in free:
                del waiting[one]

    def words(self, now: float) -> str:
        """Describe which handlers wait for which endpoints."""
        parts = []
        for endpoint in sorted(self._endpoints, key=_order):
            targets = {str(each.name) for one in endpoint.gate.running for each, _ in self._targets.get(one, ())}
            if not targets:
                continue
            words = (
                f"handler {endpoint.handler.name} of {endpoint.name} waits for calls to {', '.join(sorted(targets))}"
            )
            if endpoint in self.full:
                words += (
                    f", and that endpoint is full with max_inflight={endpoint.gate.queue.max_inflight}: "
                    f"{len(endpoint.gate.queue)} waiting, none begun for {_stands_s(endpoint, now):.1f} s"
                )
            parts.append(words)
        return "; ".join(parts)


def _order(endpoint: ServedEndpoint) -> tuple[str, int]:
    return str(endpoint.name), endpoint.instance.id


def _stands_s(endpoint: ServedEndpoint, now: float) -> float:
    """Seconds since a handler of the endpoint began.

    While requests wait, each end of a handler begins another, so this is also the time since a handler ended.
    """
    newest = next(reversed(endpoint.gate.running), None)
    return 0.0 if newest is None else now - newest.started


def _calls(request: ServedRequest, instances: Container[tuple[EndpointName, int]]) -> Iterator[AwaitedRequest]:
    """The open requests of a handler to these instances of endpoints."""
    for awaited in awaited_requests(request.context):
        if (awaited.endpoint, awaited.instance_id) in instances:
            yield awaited
