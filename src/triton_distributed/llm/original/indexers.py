"""`KvIndexer` and `ApproxKvIndexer` of the successor's binding."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from triton_distributed.llm.contract.request import packed
from triton_distributed.llm.original.background import Background
from triton_distributed.llm.original.blocks import Blocks
from triton_distributed.llm.original.feed import follow_blocks, follow_leaving
from triton_distributed.llm.original.messages import BLOCK_TOKENS
from triton_distributed.llm.original.outlet import runtime_of
from triton_distributed.llm.original.radix_tree import OverlapScores, by_worker_id
from triton_distributed.llm.routing.index import PrefixIndex
from triton_distributed.llm.routing.keys import block_keys, local_hashes
from triton_distributed.llm.routing.view import Worker
from triton_distributed.runtime.component import Component

MOST_ASSUMED = 1_000_000
"""Blocks that an `ApproxKvIndexer` remembers for all workers; of more the ones that were used least lately leave."""


class KvIndexer:
    """What the caches of a component's workers hold, by their events.

    It listens until its runtime shuts down, or nothing refers to it. Workers that leave discovery are forgotten.

    Args:
        component: of the workers.
        kv_block_size: tokens in a block. If it is left out, blocks have 64 tokens, and scores are by worker id as they
            were at first; else by (worker id, data-parallel rank).
    """

    def __init__(self, component: Component, kv_block_size: int | None = None) -> None:
        self._by_id, self._block_tokens = kv_block_size is None, _checked(kv_block_size or BLOCK_TOKENS)
        self._blocks = Blocks()
        blocks = self._blocks
        runtime = runtime_of(component)
        runtime.check("KvIndexer")
        self._background = Background(
            runtime,
            (
                lambda live: follow_blocks(component, blocks, live),
                lambda live: follow_leaving(component, blocks.forget, live),
            ),
        )
        self._end = weakref.finalize(self, self._background.close)
        self._end.atexit = False

    def block_size(self) -> int:
        """Tokens in a block."""
        return self._block_tokens

    async def find_matches(self, sequence: Iterable[int]) -> OverlapScores[Any]:
        """As `find_matches_for_request`, from the hashes of the blocks; see `compute_block_hash_for_seq`."""
        await self._background.live()
        scores = self._blocks.depths(list(sequence))
        return OverlapScores(by_worker_id(scores) if self._by_id else scores)

    async def find_matches_for_request(self, token_ids: Iterable[int], lora_id: int = 0) -> OverlapScores[Any]:
        """The workers that hold the beginning of a prompt.

        Args:
            token_ids: of the prompt.
            lora_id: no effect.

        Raises:
            RouterClosed: the runtime was shut down.
            BrokerError, ConfigError, DiscoveryError: events cannot be subscribed to.
        """
        return await self.find_matches(local_hashes(packed(token_ids), self._block_tokens))


class ApproxKvIndexer:
    """What the caches of workers probably hold, by the requests that were sent to them.

    Args:
        component: of the workers.
        kv_block_size: tokens in a block.
        router_ttl_secs: seconds after its last use for which a block counts as held.
    """

    def __init__(self, component: Component, kv_block_size: int, router_ttl_secs: float = 120.0) -> None:
        if not router_ttl_secs > 0:
            raise ValueError(f"router_ttl_secs={router_ttl_secs!r}: must be above 0")
        self._block_tokens = _checked(kv_block_size)
        self._clock = runtime_of(component).event_loop().time
        self._assumed = Assumed(router_ttl_secs, MOST_ASSUMED)

    def block_size(self) -> int:
        """Tokens in a block."""
        return self._block_tokens

    async def find_matches_for_request(self, token_ids: Iterable[int], lora_id: int = 0) -> OverlapScores[Worker]:
        """The workers that probably hold the beginning of a prompt, by (worker id, data-parallel rank)."""
        return OverlapScores(self._assumed.depths(block_keys(packed(token_ids), self._block_tokens), self._clock()))

    async def process_routing_decision_for_request(
        self, tokens: Iterable[int], worker_id: int, dp_rank: int = 0
    ) -> None:
        """Note that a request was sent to a worker."""
        keys = block_keys(packed(tokens), self._block_tokens)
        self._assumed.use((worker_id, dp_rank), keys, self._clock())


class Assumed:
    """Blocks that are held for some time after their last use. Pure.

    Args:
        seconds: that time.
        most: blocks of all workers.
    """

    def __init__(self, seconds: float, most: int) -> None:
        self._seconds, self._most = seconds, most
        self._index: PrefixIndex[Worker] = PrefixIndex(most)
        self._until: OrderedDict[tuple[Worker, int], float] = OrderedDict()

    def use(self, worker: Worker, keys: Sequence[int], now: float) -> None:
        """Note that a worker computes the blocks with these keys; see `block_keys`."""
        self._index.add(worker)
        # The last ones leave first: a worker that holds a block holds the ones before it.
        for key in reversed(keys):
            self._until[worker, key] = now + self._seconds
            self._until.move_to_end((worker, key))
        self._leave(now)
        self._index.store(worker, keys if len(keys) <= self._most else keys[: self._most])

    def depths(self, keys: Sequence[int], now: float) -> dict[Worker, int]:
        """How many of the first blocks each worker holds."""
        self._leave(now)
        return self._index.depths(keys)

    def _leave(self, now: float) -> None:
        until = self._until
        while until:
            (worker, key), at = next(iter(until.items()))
            if at > now and len(until) <= self._most:
                return
            del until[worker, key]
            self._index.discard(worker, (key,))


def _checked(block_tokens: int) -> int:
    if block_tokens < 1:
        raise ValueError(f"kv_block_size={block_tokens}: must be at least 1")
    return block_tokens
