"""A paged KV cache: blocks of tokens that sequences with an equal beginning share. Pure.

A block is free, or one sequence holds it without a key, or sequences hold it under its key, or it is kept for later: it
has a key, and none holds it. The block kept for the longest time is evicted first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from triton_distributed.llm.engines.mock.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event, Key


class Cache:
    """The blocks of an engine.

    Args:
        blocks: how many there are.
        block_tokens: tokens in a block.
        record: keep `events` for `take_events`.

    Attributes:
        total: how many blocks there are.
        record: as it was given.
    """

    def __init__(self, blocks: int, block_tokens: int, *, record: bool = False) -> None:
        self.total, self.block_tokens = blocks, block_tokens
        self.record = record
        self._events: list[Event] = []
        self._own = 0  # Blocks without a key.
        self._held: dict[Key, int] = {}  # And how many sequences hold it.
        self._kept: OrderedDict[Key, None] = OrderedDict()  # The next one to evict is the first.

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return len(self._held) + self._own

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give."""
        return self.total - len(self._held) - self._own

    def depth(self, keys: Sequence[Key]) -> int:
        """How many of the first `keys` are in the cache."""
        held, kept = self._held, self._kept
        found = 0
        for key in keys:
            if key not in held and key not in kept:
                break
            found += 1
        return found

    def kept(self, keys: Sequence[Key]) -> int:
        """How many of `keys` are in the cache, and no sequence holds them."""
        kept = self._kept
        return sum(1 for key in keys if key in kept)

    def hold(self, keys: Sequence[Key]) -> None:
        """Hold cached blocks for one more sequence."""
        held, kept = self._held, self._kept
        for key in keys:
            count = held.get(key, 0)
            if not count:
                del kept[key]
            held[key] = count + 1

    def allocate(self, count: int) -> None:
        """Take empty blocks for one sequence, `available` at most. Evicts kept ones if no others are left."""
        self._own += count
        kept = self._kept
        over = len(self._held) + self._own + len(kept) - self.total
        if over > 0:
            removed = [kept.popitem(last=False)[0] for _ in range(over)]
            if self.record:
                self._events.append(BlockRemoved(block_hashes=removed))

    def store(self, keys: Sequence[Key], parent: Key | None, ids: bytes = b"") -> None:
        """Give keys to full blocks of one sequence, so that others can share them.

        Args:
            keys: one for each of the sequence's next blocks without a key. If another block has the key already, the
                sequence holds that one instead of its own.
            parent: the key before the first.
            ids: the tokens of all the blocks, packed; empty for events without tokens.
        """
        held, kept, record = self._held, self._kept, self.record
        self._own -= len(keys)
        first = 0
        for index, key in enumerate(keys):
            count = held.get(key, 0)
            held[key] = count + 1
            if count or key in kept:
                if not count:
                    del kept[key]
                if record:
                    self._stored(keys, first, index, parent, ids)
                first = index + 1
        if record:
            self._stored(keys, first, len(keys), parent, ids)

    def release(self, keys: Sequence[Key], own: int) -> None:
        """Give back a sequence's blocks: those under `keys`, and `own` others.

        The later ones of a prompt are evicted first: fewer prompts share them.
        """
        held, kept = self._held, self._kept
        for key in reversed(keys):
            holders = held[key] - 1
            if holders:
                held[key] = holders
            else:
                del held[key]
                kept[key] = None
        self._own -= own

    def clear(self) -> bool:
        """Forget all kept blocks. Returns False, and does nothing, while sequences hold blocks."""
        if self.used:
            return False
        self._kept.clear()
        if self.record:
            self._events.append(AllBlocksCleared())
        return True

    def take_events(self) -> list[Event]:
        """The events since the last call."""
        found, self._events = self._events, []
        return found

    def _stored(self, keys: Sequence[Key], first: int, last: int, parent: Key | None, ids: bytes) -> None:
        if first == last:
            return
        size = self.block_tokens
        event = BlockStored(
            block_hashes=list(keys[first:last]),
            parent_block_hash=keys[first - 1] if first else parent,
            tokens=ids[4 * first * size : 4 * last * size],
            block_size=size,
        )
        self._events.append(event)
