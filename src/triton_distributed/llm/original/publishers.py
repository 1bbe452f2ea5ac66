"""`KvMetricsPublisher` and `KvEventPublisher`: what a worker tells the routers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence
from operator import index
from typing import Any
from weakref import WeakValueDictionary

from triton_distributed.errors import RuntimeClosed
from triton_distributed.llm.contract.request import packed
from triton_distributed.llm.original import nats_stats
from triton_distributed.llm.original.messages import (
    BLOCK_TOKENS,
    KV_EVENTS,
    KV_METRICS,
    LOAD_METRICS,
    Change,
    KvCacheEvent,
    Load,
    Removed,
    RouterEvent,
    Stored,
    StoredBlock,
    WorkerLoad,
)
from triton_distributed.llm.original.outlet import Outlet, runtime_of
from triton_distributed.llm.routing.keys import local_hashes
from triton_distributed.runtime.component import Component
from triton_distributed.runtime.serve_task import ServeTask

MOST = 2**64 - 1

served: WeakValueDictionary[tuple[str, str], Any] = WeakValueDictionary()
"""The runtimes of this process whose load is published, by namespace and component."""


class KvMetricsPublisher:
    """Tells routers the load of this process: `publish` at each change, after `create_endpoint` or before it."""

    def __init__(self) -> None:
        self._load = Load()
        self._outlets: list[tuple[int, Outlet]] = []  # With the id of the worker.

    def create_endpoint(self, component: Component) -> asyncio.Task[None]:
        """Serve the endpoint `load_metrics` of a component, until the runtime shuts down; the task then ends.

        Raises (from the task): as `Endpoint.serve_endpoint`.
        """
        return self._begin(component)[1]

    def create_service(self, component: Component) -> asyncio.Future[None]:
        """As `create_endpoint`, and await it to go on when routers can hear of this worker."""
        ready, task = self._begin(component)
        awaited: asyncio.Future[None] = runtime_of(component).spawn(_first(ready, task))
        return awaited

    def publish(
        self, request_active_slots: int, request_total_slots: int, kv_active_blocks: int, kv_total_blocks: int
    ) -> None:
        """Set the load. It may be called in any thread, and as often as it changes.

        Args:
            request_active_slots: requests that run.
            request_total_slots: the most requests that can run.
            kv_active_blocks: blocks of the KV cache that they use.
            kv_total_blocks: all blocks of the cache.

        Raises:
            OverflowError, TypeError: a number is negative, above 2**64 - 1, or no whole number.
            RuntimeClosed: the endpoint was served, and its runtime was shut down since.
        """
        given = (request_active_slots, request_total_slots, kv_active_blocks, kv_total_blocks)
        values = [index(each) for each in given]  # Engines also count with numbers of numpy.
        for each in values:
            if not 0 <= each <= MOST:
                raise OverflowError(f"publish{given}: a number must be from 0 to {MOST}")
        self._load = Load(*values)
        for entry in tuple(self._outlets):
            worker_id, outlet = entry
            try:
                outlet.send(WorkerLoad(worker_id, self._load))
            except RuntimeClosed:
                if len(self._outlets) == 1:  # It ends the loop of a program that would publish for ever.
                    raise
                self._outlets.remove(entry)

    def _begin(self, component: Component) -> tuple[asyncio.Future[Any], asyncio.Task[None]]:
        runtime = runtime_of(component)
        serving = component.endpoint(LOAD_METRICS).serve_endpoint(self._answer)
        ready: asyncio.Future[None] = runtime.event_loop().create_future()
        return ready, runtime.spawn(self._serve(component, serving, ready))

    async def _answer(self, request: object) -> AsyncIterator[Any]:
        load = self._load
        yield {name: getattr(load, name) for name in Load.__struct_fields__}

    async def _serve(self, component: Component, serving: ServeTask, ready: asyncio.Future[None]) -> None:
        runtime = runtime_of(component)
        entry = (runtime.instance_id, Outlet(component, KV_METRICS, latest=True))
        try:
            async with contextlib.AsyncExitStack() as stack:
                await _first(serving.registered, serving)
                if runtime.config.event_plane == "nats":
                    await stack.enter_async_context(nats_stats.answering(component, lambda: self._load))
                served[component.namespace, component.name] = runtime
                self._outlets.append(entry)
                entry[1].send(WorkerLoad(runtime.instance_id, self._load))
                if not ready.done():
                    ready.set_result(None)
                await serving
        finally:
            serving.cancel()


async def _first(ready: asyncio.Future[Any], task: asyncio.Task[None]) -> None:
    """Wait for a future, or for a task that ends before it, with an error or without."""
    await asyncio.wait([ready, task], return_when=asyncio.FIRST_COMPLETED)
    if not ready.done():
        await asyncio.shield(task)


class KvEventPublisher:
    """Tells routers what the cache of a worker holds, in the form of Dynamo's first releases. Any thread may use it.

    Args:
        component: of the workers.
        worker_id: of this worker: the `lease_id()` of its endpoint.
        kv_block_size: tokens in a block.
        dp_rank: the data-parallel rank.
    """

    def __init__(
        self, component: Component, worker_id: int, kv_block_size: int = BLOCK_TOKENS, dp_rank: int = 0
    ) -> None:
        if kv_block_size < 1:
            raise ValueError(f"kv_block_size={kv_block_size}: must be at least 1")
        self._outlet = Outlet(component, KV_EVENTS)
        self._worker_id, self._block_tokens, self._rank = worker_id, kv_block_size, dp_rank

    def publish_stored(
        self,
        event_id: int,
        token_ids: Iterable[int],
        num_block_tokens: Sequence[int],
        block_hashes: Sequence[int],
        lora_id: int = 0,
        parent_hash: int | None = None,
    ) -> None:
        """Tell that blocks were stored. Blocks from the first one on that is not full are left out.

        Args:
            event_id: a number for people.
            token_ids: of all blocks, one after the other.
            num_block_tokens: tokens of each block.
            block_hashes: the engine's name of each block.
            lora_id: no effect.
            parent_hash: the name of the block before the first one; None at the beginning of a prompt.

        Raises:
            ValueError: the lengths do not fit each other.
            OverflowError, TypeError: a number is invalid.
            RuntimeClosed: the runtime was closed.
        """
        tokens = packed(token_ids)
        if len(num_block_tokens) != len(block_hashes) or 4 * sum(num_block_tokens) != len(tokens):
            raise ValueError(
                f"{len(tokens) // 4} tokens, {len(num_block_tokens)} lengths with the sum {sum(num_block_tokens)} and "
                f"{len(block_hashes)} hashes do not fit each other"
            )
        whole = 0
        while whole < len(num_block_tokens) and num_block_tokens[whole] == self._block_tokens:
            whole += 1
        hashes = local_hashes(tokens[: 4 * whole * self._block_tokens], self._block_tokens)
        blocks = [StoredBlock(name, each) for name, each in zip(block_hashes, hashes, strict=False)]
        if blocks:
            self._send(event_id, Change(stored=Stored(blocks, parent_hash)))

    def publish_removed(self, event_id: int, block_hashes: Sequence[int]) -> None:
        """Tell that blocks were removed.

        Raises:
            RuntimeClosed: the runtime was closed.
        """
        if block_hashes:
            self._send(event_id, Change(removed=Removed(list(block_hashes))))

    async def flushed(self) -> None:
        """Wait, on the loop of the component, until everything is published."""
        await self._outlet.flushed()

    def _send(self, event_id: int, change: Change) -> None:
        self._outlet.send(RouterEvent(self._worker_id, KvCacheEvent(event_id, change, self._rank)))
