"""`KvRouter`: which worker has the beginning of a prompt in its cache, and capacity."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Iterable

from triton_distributed.llm.contract.errors import NoWorkers
from triton_distributed.llm.contract.request import packed
from triton_distributed.llm.original.background import Background
from triton_distributed.llm.original.blocks import Blocks
from triton_distributed.llm.original.costs import Loads
from triton_distributed.llm.original.feed import LoadFeed, follow_blocks
from triton_distributed.llm.original.messages import BLOCK_TOKENS
from triton_distributed.llm.original.outlet import runtime_of
from triton_distributed.llm.original.radix_tree import by_worker_id
from triton_distributed.llm.routing.keys import local_hashes
from triton_distributed.runtime.component import Component
from triton_distributed.runtime.distributed import DistributedRuntime

FIRST_WORKER_S = 2.0
"""Seconds that a request waits for a first worker. The original's constructor took as long."""

ASK_S = 1.0
"""Seconds without news after which workers that are all at capacity are asked for their loads."""


class KvRouter:
    """Chooses workers for prompts of tokens, by what their caches hold and what they have to do.

    Workers tell their loads with `KvMetricsPublisher`, and what they hold with the C functions or `KvEventPublisher`.
    The router listens until its runtime shuts down, or nothing refers to it.

    Args:
        drt: the runtime.
        component: of the workers.

    Raises:
        ForkError, RuntimeClosed, WrongLoop: the runtime cannot be used here, or no more.
    """

    def __init__(self, drt: DistributedRuntime, component: Component) -> None:
        drt.check("KvRouter")
        self._routing = _Routing(component)
        self._end = weakref.finalize(self, self._routing.background.close)
        self._end.atexit = False

    async def schedule(self, token_ids: Iterable[int], lora_id: int = 0) -> int:
        """Choose a worker. The choice counts as one more request there until the worker tells its load again.

        While all workers are at capacity it waits, and requests get workers in their order.

        Args:
            token_ids: of the prompt, from 0 to 2**32 - 1.
            lora_id: no effect.

        Returns:
            The worker's id, for `client.direct`.

        Raises:
            NoWorkers: no worker has told its load within 2 s.
            RouterClosed: the runtime was shut down.
            OverflowError, TypeError: a token id is invalid.
            BrokerError, ConfigError, DiscoveryError: workers cannot be heard.
        """
        return await self._routing.schedule(packed(token_ids))


class _Routing:
    """What a router knows. Its tasks refer to this, and not to the router."""

    def __init__(self, component: Component) -> None:
        self._component = component
        self._blocks = Blocks()
        self._loads = Loads()
        self._feed = LoadFeed(component, self._loads.by_worker, self._blocks.forget)
        self._turn = asyncio.Lock()
        runtime = runtime_of(component)
        self._clock: Callable[[], float] = runtime.event_loop().time
        self.background = Background(runtime, (self._follow, self._feed.run), self._feed.changed.set)

    async def _follow(self, live: Callable[[], None]) -> None:
        await follow_blocks(self._component, self._blocks, live)

    async def schedule(self, prompt: bytes) -> int:
        until = self._clock() + FIRST_WORKER_S
        await self.background.live()
        hashes, loads = local_hashes(prompt, BLOCK_TOKENS), self._loads
        async with self._turn:
            while True:
                self.background.check()
                chosen = loads.choose(by_worker_id(self._blocks.depths(hashes)), len(prompt) // 4)
                if chosen is not None:
                    return chosen
                changed = self._feed.changed
                changed.clear()
                try:
                    async with asyncio.timeout(ASK_S if loads.by_worker else until - self._clock()):
                        await changed.wait()
                except TimeoutError:
                    if not loads.by_worker and self._clock() >= until:
                        raise NoWorkers(f"{self._component.namespace}/{self._component.name}", FIRST_WORKER_S) from None
                    self._feed.ask()
