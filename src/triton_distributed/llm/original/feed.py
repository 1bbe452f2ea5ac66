"""What a router hears of workers: the events of their caches, their loads, and that they are gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from triton_distributed.discovery.base import Added, Change, Removed
from triton_distributed.errors import DecodeError
from triton_distributed.llm.original import nats_stats
from triton_distributed.llm.original.blocks import Blocks, UnknownBlocks
from triton_distributed.llm.original.messages import (
    KV_EVENTS,
    KV_METRICS,
    LOAD_METRICS,
    Load,
    RouterEvent,
    WorkerLoad,
)
from triton_distributed.llm.original.outlet import runtime_of
from triton_distributed.names import EndpointName
from triton_distributed.quiet import Quiet
from triton_distributed.runtime.component import Component

logger = logging.getLogger("triton_distributed.llm")

ANSWER_S = 5.0
"""Seconds for a worker to answer `load_metrics`."""

SILENT_QUESTIONS = 3
"""Questions without an answer after which a worker that only NATS knows is gone."""

_events = msgspec.json.Decoder(RouterEvent)
_loads = msgspec.json.Decoder(WorkerLoad)
_complaints = Quiet(5.0)


def _reader(decoder: msgspec.json.Decoder[Any]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DecodeError(str(error)) from error

    return read


async def follow_blocks(component: Component, blocks: Blocks, live: Callable[[], None]) -> None:
    """Note the events of all workers' caches, until the runtime ends. What was noted before is forgotten.

    Args:
        live: called when every later event is noted.

    Raises:
        BrokerError, ConfigError, DiscoveryError: events cannot be subscribed to.
    """
    blocks.reset()
    plane = runtime_of(component).events.plane()
    async with plane.subscribe(component.event_subject(KV_EVENTS), read=_reader(_events)) as events:
        live()
        async for each in events:
            try:
                blocks.apply(each.worker_id, each.event)
            except UnknownBlocks as error:
                if (more := _complaints.due(each.worker_id)) is not None:
                    logger.warning(
                        "event %d of worker %d: %s%s",
                        each.event.event_id,
                        each.worker_id,
                        error,
                        f" ({more} more events like this)" if more else "",
                    )


async def follow_leaving(component: Component, gone: Callable[[int], None], live: Callable[[], None]) -> None:
    """Follow which workers leave discovery, until it is cancelled.

    Args:
        component: of the workers, with any endpoint.
        gone: called with the id of a worker that has left.
        live: called when every later leaving is noticed.

    Raises:
        DiscoveryError: discovery cannot be read.
    """
    of = (component.namespace, component.name)
    listed: dict[int, set[EndpointName]] = {}  # The endpoints of each worker.

    def leave(worker_id: int) -> None:
        del listed[worker_id]
        gone(worker_id)

    def note(change: Change) -> None:
        if isinstance(change, Removed):
            endpoints = listed.get(change.instance_id, set())
            if change.endpoint in endpoints:
                endpoints.discard(change.endpoint)
                if not endpoints:
                    leave(change.instance_id)
            return
        found: dict[int, set[EndpointName]] = {}
        for each in (change.instance,) if isinstance(change, Added) else change.instances:
            if (each.endpoint.namespace, each.endpoint.component) == of:
                found.setdefault(each.id, set()).add(each.endpoint)
        if isinstance(change, Added):
            for id, endpoints in found.items():
                listed.setdefault(id, set()).update(endpoints)
        else:
            for id in listed.keys() - found.keys():
                leave(id)
            listed.update(found)

    watch = await runtime_of(component).discovery.watch(None, note)
    try:
        live()
        await asyncio.Event().wait()
    finally:
        watch.close()


class LoadFeed:
    """Follows the loads of a component's workers.

    Args:
        component: of the workers.
        loads: gets each worker's load, and loses it when the worker is gone.
        gone: called with the id of a worker that is gone.

    Attributes:
        changed: set after each change of a load.
    """

    def __init__(self, component: Component, loads: dict[int, Load], gone: Callable[[int], None]) -> None:
        self._component, self._runtime = component, runtime_of(component)
        self._loads, self._gone = loads, gone
        self.changed = asyncio.Event()
        self._client: Any = None
        self._listed: frozenset[int] = frozenset()
        self._left: frozenset[int] = frozenset()  # They were listed, and may still answer while they drain.
        self._asking: dict[int, asyncio.Task[None]] = {}
        self._silent: dict[int, int] = {}  # Questions without an answer, of workers that answer over NATS.

    async def run(self, live: Callable[[], None]) -> None:
        """Follow the loads until the runtime ends. What was known before is forgotten.

        Args:
            live: called when the workers that are registered now have told their loads.

        Raises:
            BrokerError, ConfigError, DiscoveryError: events cannot be subscribed to, or discovery cannot be read.
        """
        self._listed = self._left = frozenset()
        self._silent.clear()
        self._loads.clear()
        plane = self._runtime.events.plane()
        subject = self._component.event_subject(KV_METRICS)
        async with plane.subscribe(subject, read=_reader(_loads)) as events:
            # Those that are there now are asked.
            self._client = self._component.endpoint(LOAD_METRICS).unopened_client()
            await self._client.candidates.open()
            table = self._client.candidates.table
            table.listeners.append(self._compare)
            over_nats = None
            try:
                self._compare()
                if self._runtime.config.event_plane == "nats":
                    over_nats = self._runtime.spawn(nats_stats.ask(self._component, self._answered, self._asked))
                if self._asking:
                    await asyncio.wait(self._asking.values(), timeout=ANSWER_S)
                live()
                async for each in events:
                    if each.worker_id in self._listed:  # One that drains still tells its load.
                        self._note(each.worker_id, each.data)
            finally:
                table.listeners.remove(self._compare)
                for task in (*self._asking.values(), *filter(None, [over_nats])):
                    task.cancel()

    def ask(self) -> None:
        """Ask all workers for their loads."""
        for each in self._listed:
            if each not in self._asking:
                self._asking[each] = task = self._runtime.spawn(self._ask(each))
                task.add_done_callback(lambda _, id=each: self._asking.pop(id, None))

    async def _ask(self, worker_id: int) -> None:
        before = self._loads.get(worker_id)
        try:
            async for each in self._client.direct(None, worker_id, annotated=False, timeout=ANSWER_S):
                if self._loads.get(worker_id) is before:  # It has told nothing newer meanwhile.
                    self._note(worker_id, msgspec.convert(each, Load))
        except Exception as error:  # A handler's error has any type.
            logger.debug("worker %d does not tell its load: %s", worker_id, error)

    def _compare(self) -> None:
        listed = frozenset(self._client.candidates.table.by_id)
        gone, new = self._listed - listed, listed - self._listed
        self._listed = listed
        self._left = (self._left | gone) - listed
        for each in gone:
            self._forget(each)
        if new:
            self.ask()

    def _note(self, worker_id: int, load: Load) -> None:
        self._loads[worker_id] = load
        self.changed.set()

    def _forget(self, worker_id: int) -> None:
        self._loads.pop(worker_id, None)
        self._silent.pop(worker_id, None)
        self._gone(worker_id)

    def _answered(self, worker_id: int, load: Load) -> None:
        if worker_id not in self._left:
            self._silent[worker_id] = 0
            self._note(worker_id, load)

    def _asked(self) -> None:
        for each in list(self._silent):
            self._silent[each] += 1
            if self._silent[each] > SILENT_QUESTIONS and each not in self._listed:
                self._forget(each)
