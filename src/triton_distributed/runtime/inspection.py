"""Inspection: every worker answers questions about itself on its sessions, and `trd` asks them.

A worker answers requests for one reserved endpoint, `INSPECT`. It has limits of its own, so that a worker at capacity
answers too. A client finds the workers by the instances of all endpoints. Discovery lists the reserved endpoint only
while its worker has paused another one, so that the worker is found then too. A program that serves an endpoint of this
name replaces it in its own process.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from itertools import islice
from typing import Any, Literal, Protocol

import msgspec

from triton_distributed.discovery import Added, Change, Discovery, Removed, Sink, Snapshot
from triton_distributed.discovery.base import Watch
from triton_distributed.names import INSPECT, EndpointName, Instance
from triton_distributed.observe.stacks import stack
from triton_distributed.runtime.rates import counters_of
from triton_distributed.runtime.recording import Recording, is_recorded
from triton_distributed.runtime.reports import report_of
from triton_distributed.runtime.requests import RequestReport, requests_of
from triton_distributed.runtime.statistics import RuntimeStatistics
from triton_distributed.runtime.worker import Worker
from triton_distributed.serving.endpoint import ServedEndpoint
from triton_distributed.transport.fairness import FairShare

LIMITS = 4, 64
"""The most questions that are answered at once, and that wait beyond these: questions must not hold up requests."""

MOST_RECORDINGS = 2
"""Recordings at a time: each occupies one of the places above until its client leaves."""

CHUNK = 100
"""Requests in one item of an answer. The event loop turns after each item, which takes about a millisecond."""


class Question(msgspec.Struct, forbid_unknown_fields=True):
    """What a client asks.

    Attributes:
        about: `worker` (one item, see `WorkerReport`; it costs the worker least), `counters` (one item, see
            `rates.Counters`), `statistics` (one item, see `RuntimeStatistics`), `requests` (items of up to `CHUNK`
            reports each), `stacks` (one item: the stack of each thread, by its name) or `recording` (first an empty
            item, then one `Exchange` for each request that has ended, until the caller leaves).
        id: only requests of this id; empty for all.
        stacks: reports of requests contain the steps of the handlers' code.
        endpoint: what is recorded, `namespace.component.endpoint`.
        metadata: metadata is recorded too.
    """

    about: Literal["worker", "counters", "statistics", "requests", "stacks", "recording"]
    id: str = ""
    stacks: bool = False
    endpoint: str = ""
    metadata: bool = False


class Inspected(Protocol):
    """The part of a runtime that is inspected."""

    worker: Worker
    instance_id: int

    def statistics(self) -> RuntimeStatistics: ...


def answering(runtime: Inspected, share: FairShare) -> Callable[..., AsyncIterator[Any]]:
    """Make the handler of the reserved endpoint of a runtime.

    Args:
        runtime: the runtime.
        share: counts the bytes of its sessions.
    """

    async def inspect(question: Question) -> AsyncIterator[Any]:
        if question.about == "worker":
            yield msgspec.to_builtins(report_of(runtime.worker))
        elif question.about == "counters":
            yield msgspec.to_builtins(counters_of(runtime.instance_id, runtime.worker, share))
        elif question.about == "statistics":
            yield msgspec.to_builtins(runtime.statistics())
        elif question.about == "stacks":
            yield _stacks()
        elif question.about == "recording":
            with Recording(_recordable(runtime, question.endpoint), question.metadata) as recording:
                yield {}
                async for exchange in recording:
                    yield exchange
        else:
            reports = requests_of(runtime.worker.server.endpoints, question.stacks)
            if question.id:
                reports = (each for each in reports if each.id == question.id)
            while chunk := list(islice(reports, CHUNK)):
                yield msgspec.to_builtins(chunk)
                await asyncio.sleep(0)

    return inspect


def _recordable(runtime: Inspected, name: str) -> ServedEndpoint:
    endpoints = runtime.worker.server.endpoints
    if sum(map(is_recorded, endpoints)) >= MOST_RECORDINGS:
        raise RuntimeError(f"this worker makes {MOST_RECORDINGS} recordings already")
    for each in endpoints:
        if str(each.name) == name:
            return each
    raise LookupError(f"this worker does not serve {name}")


def _stacks() -> dict[str, str]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {names.get(ident, f"thread {ident}"): stack(frame) for ident, frame in sys._current_frames().items()}


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


def read_reports(items: Any) -> list[RequestReport]:
    """The reports in one item of the answer about `requests`.

    Raises:
        msgspec.ValidationError: the worker has another version, whose reports differ.
    """
    return msgspec.convert(items, list[RequestReport])
