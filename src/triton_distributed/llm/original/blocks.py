"""The blocks that workers hold, by the names that their engines give them. Pure."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from triton_distributed.llm.original.messages import (
    Change,
    KvCacheEvent,
    RouterEvent,
    Stored,
    StoredBlock,
)
from triton_distributed.llm.routing.index import PrefixIndex
from triton_distributed.llm.routing.keys import sequence_hashes
from triton_distributed.llm.routing.view import Worker

logger = logging.getLogger("triton_distributed.llm")

MOST_BLOCKS = 4_000_000
"""Blocks of all workers, if nothing else is given. A block takes about 200 bytes."""


class UnknownBlocks(LookupError):
    """An event names blocks that the worker does not hold. What it says of other blocks was noted."""


class Blocks:
    """Which worker holds which blocks. An engine's names are opaque: they only link a block to its parent.

    Args:
        max_blocks: the most blocks of all workers. Further ones are not noted, which is logged once.
        tells: keep what `events` needs.
    """

    def __init__(self, max_blocks: int = MOST_BLOCKS, *, tells: bool = False) -> None:
        self._max, self._tells = max_blocks, tells
        self._said = False
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._index: PrefixIndex[Worker] = PrefixIndex(self._max)
        self._held: dict[Worker, dict[int, int]] = {}  # Name → key, of which only numbers are cheap to forget.
        self._origins: dict[Worker, dict[int, tuple[int | None, int]]] = {}  # Name → parent, hash of the tokens.
        self._count = 0

    def __len__(self) -> int:
        """The blocks of all workers."""
        return self._count

    def apply(self, worker_id: int, event: KvCacheEvent) -> None:
        """Note a change of a worker's cache.

        Raises:
            UnknownBlocks: blocks follow an unknown parent, and were not noted; or unknown blocks were removed.
        """
        worker = (worker_id, event.dp_rank)
        self._index.sweep()
        if event.data == "cleared":
            self._clear(worker)
        elif isinstance(event.data, Change):
            if event.data.removed is not None:
                self._remove(worker, event.data.removed.block_hashes)
            if event.data.stored is not None:
                self._store(worker, event.data.stored)

    def _store(self, worker: Worker, stored: Stored) -> None:
        held = self._held.get(worker)
        parent, key = stored.parent_hash, None
        if parent is not None:
            if held is None or parent not in held:
                raise UnknownBlocks(f"the parent block {parent} is unknown; {len(stored.blocks)} blocks are skipped")
            key = held[parent]
        if held is None:
            held = self._held[worker] = {}
            self._index.add(worker)
        origins = self._origins.setdefault(worker, {}) if self._tells else None
        keys = []
        for block in stored.blocks:
            # The keys are the chained hashes of Dynamo, so the children of one block differ by their tokens.
            key = block.tokens_hash if key is None else sequence_hashes((key, block.tokens_hash))[1]
            known = held.get(block.block_hash)
            if known is None:
                if self._count >= self._max:
                    self._full()
                    break
                self._count += 1
            elif known != key:  # The engine gave the name to another block.
                self._index.discard(worker, (known,))
            held[block.block_hash] = key
            if origins is not None:
                origins[block.block_hash] = (parent, block.tokens_hash)
            keys.append(key)
            parent = block.block_hash
        self._index.store(worker, keys)

    def _full(self) -> None:
        if not self._said:
            self._said = True
            logger.warning("%d blocks are known, and further ones are not noted (logged once)", self._max)

    def _remove(self, worker: Worker, names: Sequence[int]) -> None:
        held = self._held.get(worker, {})
        found = [held.pop(each) for each in names if each in held]
        self._count -= len(found)
        if found:
            self._index.discard(worker, found)
            if self._tells:
                for name in names:
                    self._origins[worker].pop(name, None)
        if len(found) < len(names):
            raise UnknownBlocks(f"{len(names) - len(found)} of {len(names)} removed blocks are unknown")

    def _clear(self, worker: Worker) -> None:
        held = self._held.get(worker)
        if held is not None:
            self._count -= len(held)
            self._held[worker] = {}
            self._origins.pop(worker, None)
            self._index.clear(worker)

    def clear(self, worker_id: int) -> None:
        """Note that a worker holds nothing any more, at none of its ranks."""
        for worker in [each for each in self._held if each[0] == worker_id]:
            self._clear(worker)

    def forget(self, worker_id: int) -> None:
        """Forget a worker with all its ranks. Nothing happens if it is unknown."""
        for worker in [each for each in self._held if each[0] == worker_id]:
            self._count -= len(self._held.pop(worker))
            self._origins.pop(worker, None)
            self._index.remove(worker)

    def depths(self, hashes: Sequence[int]) -> dict[Worker, int]:
        """How many of the first blocks of a prompt each worker holds.

        Engines may remove a block in the middle and keep its children, so each block is looked up.

        Args:
            hashes: of the tokens of each block; see `local_hashes`.
        """
        return self._index.walked_depths(sequence_hashes(hashes))

    def events(self) -> Iterator[RouterEvent]:
        """An event for each block, parents first, from which other blocks of the same content can be made.

        A store without `tells` has no events.
        """
        number = 0
        for (worker_id, rank), held in self._origins.items():
            done: set[int] = set()
            for name in held:
                chain = []
                at: int | None = name
                while at is not None and at in held and at not in done:
                    chain.append(at)
                    done.add(at)
                    at = held[at][0]
                if at is not None and at not in held:  # A block without its parent would be unknown.
                    continue
                for each in reversed(chain):
                    parent, tokens_hash = held[each]
                    stored = Stored([StoredBlock(each, tokens_hash)], parent)
                    yield RouterEvent(worker_id, KvCacheEvent(number, Change(stored=stored), rank))
                    number += 1
