"""The index: which workers hold which beginnings of prompts. Pure.

It is a table from the key of a block to the set of its holders, as bits of a number. A worker that holds a block holds
all blocks before it, too: workers promise that. So the depth of a match is found by bisection.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

Worker = TypeVar("Worker", bound=Hashable)

MAX_ENTRIES = 20_000_000
"""Entries of the index, if nothing else is given. An entry takes 85 to 150 bytes."""

SHARDS = 256
"""Parts of the table: the bits of a worker that is gone are removed from one part at a time."""


class PrefixIndex(Generic[Worker]):
    """Which workers hold which blocks.

    Args:
        max_entries: the most keys. Further ones are not stored; `dropped` counts them.

    Attributes:
        dropped: keys that were not stored because the index was full.
    """

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._shards: list[dict[int, int]] = [{} for _ in range(SHARDS)]
        self._max, self.dropped = max_entries, 0
        self._bound = 0  # There are not more entries than this.
        self._bit_of: dict[Worker, int] = {}
        self._worker_of: dict[int, Worker] = {}  # By the place of the bit: powers of two would collide in a table.
        self._alive = 0  # The bits of the present workers.
        self._next = 1
        self._used = 0  # Bits that entries may have.
        self._unused: list[int] = []  # Bits that no entry has.
        self._gone = 0  # Those of them whose workers are gone.
        self._sweeping, self._at = 0, 0

    def __len__(self) -> int:
        """The keys in the table. Those of workers that are gone count until `sweep` has removed them."""
        return sum(map(len, self._shards))

    @property
    def workers(self) -> tuple[Worker, ...]:
        """The workers that were added."""
        return tuple(self._bit_of)

    def add(self, worker: Worker) -> None:
        """Add a worker that holds nothing yet. Nothing happens if it is there."""
        if worker in self._bit_of:
            return
        if self._unused:
            bit = self._unused.pop()
        else:
            bit, self._next = self._next, self._next << 1
        self._bit_of[worker] = bit
        self._worker_of[bit.bit_length()] = worker
        self._alive |= bit

    def remove(self, worker: Worker) -> None:
        """Forget a worker, at once for all look-ups. `sweep` frees the memory. Nothing happens if it is unknown."""
        bit = self._bit_of.pop(worker, 0)
        if bit:
            del self._worker_of[bit.bit_length()]
            self._alive &= ~bit
            if self._used & bit:
                self._gone |= bit
            else:
                self._unused.append(bit)

    def clear(self, worker: Worker) -> None:
        """Note that a worker holds nothing any more."""
        self.remove(worker)
        self.add(worker)

    def store(self, worker: Worker, keys: Sequence[int]) -> None:
        """Note that a worker holds blocks. It holds the ones before them, or they come earlier in `keys`.

        Raises:
            KeyError: the worker was not added.
        """
        bit, shards = self._bit_of[worker], self._shards
        self._used |= bit
        self._bound += len(keys)
        if self._bound > self._max:
            keys = self._fitting(keys)
        for key in keys:
            shard = shards[key & 255]
            mask = shard.setdefault(key, bit)
            if mask is not bit and not mask & bit:
                shard[key] = mask | bit

    def _fitting(self, keys: Sequence[int]) -> Sequence[int]:
        """Those of the keys that are known, and the first others for which there is room."""
        room = self._max - len(self)
        self._bound = self._max - room + len(keys)
        if len(keys) <= room:
            return keys
        fitting, new = [], set[int]()
        for key in keys:
            if key not in self._shards[key & 255] and key not in new:
                if len(new) >= room:
                    self.dropped += 1
                    continue
                new.add(key)
            fitting.append(key)
        return fitting

    def discard(self, worker: Worker, keys: Iterable[int]) -> None:
        """Note that a worker does not hold blocks any more. Unknown keys are passed over.

        Raises:
            KeyError: the worker was not added.
        """
        bit, shards = self._bit_of[worker], self._shards
        for key in keys:
            shard = shards[key & 255]
            mask = shard.get(key, 0)
            if mask == bit:
                del shard[key]
            elif mask & bit:
                shard[key] = mask ^ bit

    def depths(self, keys: Sequence[int]) -> dict[Worker, int]:
        """How many of the first blocks of a prompt each worker holds. Workers that hold none are not in the answer."""
        found: dict[Worker, int] = {}
        if not keys:
            return found
        shards, key = self._shards, keys[0]
        first = shards[key & 255].get(key, 0) & self._alive
        if not first:
            return found
        # Each entry: workers of `low` hold the block `at`, those of `high` also the block `end`.
        work = [(0, first, len(keys), 0)]
        while work:
            at, low, end, high = work.pop()
            while end - at > 1:
                middle = (at + end) >> 1
                key = keys[middle]
                mask = (shards[key & 255].get(key, 0) & low) | high
                if mask == low:
                    at = middle
                else:
                    if mask != high:
                        work.append((middle, mask, end, high))
                    end, high = middle, mask
            self._note(found, low & ~high, end)
        return found

    def walked_depths(self, keys: Sequence[int]) -> dict[Worker, int]:
        """The same as `depths`, found by walking from the first block: right even if workers break their promise."""
        found: dict[Worker, int] = {}
        shards, holders = self._shards, self._alive
        for at, key in enumerate(keys):
            mask = shards[key & 255].get(key, 0) & holders
            if mask != holders and at:
                self._note(found, holders & ~mask, at)
            holders = mask
            if not holders:
                return found
        if keys:
            self._note(found, holders, len(keys))
        return found

    def sweep(self) -> bool:
        """Remove workers that are gone from a part of the table, within about 1 ms for a million keys.

        Returns:
            Whether a further call has something to do.
        """
        if not self._sweeping:
            self._sweeping, self._at = self._gone, 0
            if not self._sweeping:
                return False
        gone, shard = self._sweeping, self._shards[self._at]
        for key in [key for key, mask in shard.items() if mask & gone]:
            mask = shard[key] & ~gone
            if mask:
                shard[key] = mask
            else:
                del shard[key]
        self._at += 1
        if self._at == SHARDS:
            self._gone &= ~gone
            self._used &= ~gone
            self._sweeping = 0
            while gone:
                bit = gone & -gone
                self._unused.append(bit)
                gone ^= bit
        return bool(self._gone)

    def _note(self, found: dict[Worker, int], mask: int, depth: int) -> None:
        workers = self._worker_of
        while mask:
            place = mask.bit_length()
            found[workers[place]] = depth
            mask ^= 1 << (place - 1)
