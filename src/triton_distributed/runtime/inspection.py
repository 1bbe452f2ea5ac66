"""Inspection: every worker answers questions about itself on its sessions, and `trd` asks them.

A worker answers requests for one reserved endpoint, `INSPECT`. It has limits of its own, so that a worker at capacity
answers too. A client finds the workers by the instances of all endpoints. Discovery lists the reserved endpoint only
while its worker has paused another one, or drains and requests still run, so that the worker is found then too. A
program that serves an endpoint of this name replaces it in its own process.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from triton_distributed.discovery import Added, Change, Discovery, Removed, Sink, Snapshot
from triton_distributed.discovery.base import Watch
from triton_distributed.names import INSPECT, EndpointName, Instance
from triton_distributed.system.fork import no_fork
from triton_distributed.transport.fairness import FairShare

LIMITS = 4, 64
"""The most questions that are answered at once, and that wait beyond these: questions must not hold up requests."""


def answering(runtime: Any, share: FairShare) -> Callable[[], Callable[..., Any]]:
    """Return what makes the handler of the reserved endpoint; see `runtime.answering`, which is imported only then."""

    def make() -> Callable[..., Any]:
        with no_fork:
            module = importlib.import_module("triton_distributed.runtime.answering")
        return module.answering(runtime, share)  # type: ignore[no-any-return]

    return make


class WorkersDiscovery:
    """A discovery that also lists each worker once, as an instance of the reserved endpoint.

    Args:
        discovery: the discovery of the workers' endpoints.
    """

    def __init__(self, discovery: Discovery) -> None:
        self._discovery = discovery

    @property
    def where(self) -> str:
        """The address of the discovery."""
        return self._discovery.where

    async def register(self, instance: Instance) -> None:
        """Publish an instance; see `Discovery.register`."""
        await self._discovery.register(instance)

    async def withdraw(self, instance: Instance) -> None:
        """Remove an instance; see `Discovery.withdraw`."""
        await self._discovery.withdraw(instance)

    async def watch(self, endpoint: EndpointName | None, sink: Sink) -> Watch:
        """Watch an endpoint, or the workers; see `Discovery.watch`."""
        if endpoint == INSPECT:
            return await self._discovery.watch(None, _Workers(sink).apply)
        return await self._discovery.watch(endpoint, sink)

    async def close(self) -> None:
        """Close the discovery."""
        await self._discovery.close()


class _Workers:
    """Turns changes of endpoints' instances into changes of workers: a worker lives as long as any of its instances."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._served: dict[int, set[EndpointName]] = {}  # By instance id: the endpoints that the worker serves.

    def apply(self, change: Change) -> None:
        if isinstance(change, Snapshot):
            self._served = {}
            for each in change.instances:
                self._served.setdefault(each.id, set()).add(each.endpoint)
            self._sink(Snapshot(tuple({each.id: _worker(each) for each in change.instances}.values())))
        elif isinstance(change, Added):
            self._served.setdefault(change.instance.id, set()).add(change.instance.endpoint)
            self._sink(Added(_worker(change.instance)))
        else:
            served = self._served.get(change.instance_id, set())
            served.discard(change.endpoint)
            if not served and self._served.pop(change.instance_id, None) is not None:
                self._sink(Removed(INSPECT, change.instance_id))


def _worker(instance: Instance) -> Instance:
    """The worker of an instance. It is never busy: a client asks a worker even if its loop was reported as stuck."""
    return replace(instance, endpoint=INSPECT, metadata={}, busy=False, contract=None)
