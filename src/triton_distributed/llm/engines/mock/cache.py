"""A paged KV cache: blocks of tokens that sequences with an equal beginning share. Pure.

A block is in one of three places: held by sequences, kept for later (full, and held by none), or free. The block kept
for the longest time is evicted first.
"""

from __future__ import annotations

from collections import OrderedDict

from triton_distributed.llm.contract.request import unpacked
from triton_distributed.llm.engines.mock.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event


class Cache:
    """The blocks of an engine.

    Args:
        blocks: how many there are.
        block_tokens: tokens in a block.
        record: keep `events` for `take_events`.
    """

    def __init__(self, blocks: int, block_tokens: int, *, record: bool = False) -> None:
        self.total, self.block_tokens = blocks, block_tokens
        self._record = record
        self._events: list[Event] = []
        self._unused = 0  # Blocks from this number on were never used.
        self._free: list[int] = []
        self._kept: OrderedDict[int, None] = OrderedDict()  # The next one to evict is the first.
        self._holders: dict[int, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return len(self._holders)

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give."""
        return self.total - len(self._holders)

    def cached(self, keys: list[bytes]) -> list[int]:
        """The blocks of the longest beginning of `keys` that is in the cache. They are not held yet."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def kept(self, blocks: list[int]) -> int:
        """How many of `blocks` no sequence holds."""
        return sum(1 for block in blocks if block not in self._holders)

    def hold(self, blocks: list[int]) -> None:
        """Hold cached blocks for one more sequence."""
        for block in blocks:
            self._kept.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1

    def allocate(self, count: int) -> list[int]:
        """Take empty blocks for one sequence, `available` at most. Evicts kept ones if no others are left."""
        assert count <= self.available
        found, removed = [], []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            elif self._unused < self.total:
                block, self._unused = self._unused, self._unused + 1
            else:
                block, _ = self._kept.popitem(last=False)
                key = self._key_of.pop(block)
                del self._block_of[key]
                removed.append(key)
            self._holders[block] = 1
            found.append(block)
        if removed and self._record:
            self._events.append(BlockRemoved(block_hashes=removed))
        return found

    def store(self, blocks: list[int], keys: list[bytes], parent: bytes | None, ids: bytes) -> None:
        """Make full blocks of one sequence available to others.

        Args:
            blocks: one after the other, all held.
            keys: one for each. A key that another block has already is left to that one.
            parent: the key before the first.
            ids: the tokens of all `blocks`, packed.
        """
        run: list[bytes] = []
        first, before = 0, parent
        for index, (block, key) in enumerate(zip(blocks, keys, strict=True)):
            if key in self._block_of:
                self._stored(run, before, ids, first)
                run, first, before = [], index + 1, key
                continue
            self._block_of[key] = block
            self._key_of[block] = key
            run.append(key)
        self._stored(run, before, ids, first)

    def release(self, blocks: list[int]) -> None:
        """Give back a sequence's blocks. The later ones of a prompt are evicted first: fewer prompts share them."""
        for block in reversed(blocks):
            holders = self._holders[block] - 1
            if holders:
                self._holders[block] = holders
                continue
            del self._holders[block]
            if block in self._key_of:
                self._kept[block] = None
            else:
                self._free.append(block)

    def clear(self) -> bool:
        """Forget all kept blocks. Returns False, and does nothing, while sequences hold blocks."""
        if self._holders:
            return False
        self._free += self._kept
        self._kept.clear()
        self._key_of.clear()
        self._block_of.clear()
        if self._record:
            self._events.append(AllBlocksCleared())
        return True

    def take_events(self) -> list[Event]:
        """The events since the last call."""
        found, self._events = self._events, []
        return found

    def _stored(self, keys: list[bytes], parent: bytes | None, ids: bytes, first: int) -> None:
        if keys and self._record:
            size = self.block_tokens
            token_ids = unpacked(ids[4 * first * size : 4 * (first + len(keys)) * size]).tolist()
            event = BlockStored(block_hashes=keys, parent_block_hash=parent, token_ids=token_ids, block_size=size)
            self._events.append(event)
