"""Which blocks of prompts the cache of an engine without events holds, as far as its requests tell. Pure.

The least recently used blocks leave, the later ones of a prompt first. The cached tokens that the engine reports for a
request correct this: they tell how much of the prompt was there when it came.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from triton_distributed.llm.kv_events.change import Change, keys_array
from triton_distributed.llm.kv_events.held import SLICE_KEYS

CACHE_TOKENS = 1 << 20
"""Tokens of a cache whose engine does not tell its size: 16,384 blocks of 64, as Dynamo's mocker has."""


class Asked:
    """One request: what was believed when it came.

    Attributes:
        change: what has changed with it.
        depth: how many of its first blocks were believed to be held.
        tokens: of its prompt.
    """

    __slots__ = ("change", "depth", "stamps", "tokens")

    def __init__(self, change: Change, stamps: array[int], tokens: int) -> None:
        self.change, self.tokens = change, tokens
        self.depth = len(stamps)
        self.stamps = stamps  # When each of these blocks was last used.


class AssumedBlocks:
    """The blocks that a cache is believed to hold.

    Args:
        key_tokens: tokens in a block of the index.
        cache_tokens: tokens that the cache holds at most.

    Attributes:
        blocks: the most blocks that are believed to be held. It falls when blocks are missing that should be there, and
            rises, up to the size of the cache, when there are more than believed.
        asked_tokens, believed_tokens, measured_tokens: of the prompts of those requests for which the engine reported
            cached tokens: all, those believed to be cached, and those that were.
    """

    def __init__(self, key_tokens: int, cache_tokens: int = CACHE_TOKENS) -> None:
        self.key_tokens = key_tokens
        self._most = max(1, cache_tokens // key_tokens)
        self.blocks = self._most
        self.asked_tokens = self.believed_tokens = self.measured_tokens = 0
        self._stamps: OrderedDict[int, int] = OrderedDict()  # By key, the oldest first.
        self._next = 0
        self._reports = False  # The engine has reported cached tokens at least once.

    def __len__(self) -> int:
        """The blocks that are believed to be held."""
        return len(self._stamps)

    def request(self, keys: Sequence[int], tokens: int) -> Asked:
        """Note that an engine computes a prompt, which then is in its cache.

        Args:
            keys: of the whole blocks of the prompt, and of the answer when it is known.
            tokens: of the prompt.
        """
        stamps, stored = self._stamps, keys_array()
        before = array("q")
        for key in keys:
            stamp = stamps.get(key)
            if stamp is None:
                break
            before.append(stamp)
        # More than the cache holds would push out the beginning.
        keys = keys[: self.blocks]
        stored.extend(keys[len(before) :])
        stamp = self._next
        for key in reversed(keys):  # The first block is used last, so that it leaves last.
            stamps.pop(key, None)
            stamps[key] = stamp
            stamp += 1
        self._next = stamp
        removed = keys_array()
        while len(stamps) > self.blocks:
            removed.append(stamps.popitem(last=False)[0])
        return Asked(Change(stored, removed), before, tokens)

    def usage(self, asked: Asked, cached_tokens: int) -> Change:
        """Note how many tokens of a request's prompt were cached when it came.

        If blocks were missing, those not used for longer are missing too. An engine that has never reported a cached
        token is not believed to have none.
        """
        # The last token of a prompt is computed in any case, so a block that ends with it never counts as cached.
        expected = min(asked.depth, (asked.tokens - 1) // self.key_tokens)
        self.asked_tokens += asked.tokens
        self.believed_tokens += expected * self.key_tokens
        self.measured_tokens += cached_tokens
        self._reports = self._reports or cached_tokens > 0
        depth = cached_tokens // self.key_tokens
        removed = keys_array()
        if depth > asked.depth:
            self.blocks = min(self._most, self.blocks + depth - asked.depth)
        elif depth < expected and self._reports:
            missing = asked.stamps[depth]
            for key, stamp in self._stamps.items():
                if stamp > missing:
                    break
                removed.append(key)
            for key in removed:
                del self._stamps[key]
            # The cache does not hold what was used since then, and the missing block besides.
            self.blocks = max(1, len(self._stamps))
        return Change(keys_array(), removed)

    def clear(self) -> Change:
        """Note that the cache was cleared."""
        self._stamps.clear()
        return Change(keys_array(), keys_array(), cleared=True)

    def snapshot(self, slice_keys: int = SLICE_KEYS) -> Iterator[array[int]]:
        """The keys of all blocks, in slices, as `HeldBlocks.snapshot` gives them."""
        found = keys_array()
        for key in list(reversed(self._stamps)):  # The blocks before one were used after it.
            if key in self._stamps:
                found.append(key)
                if len(found) >= slice_keys:
                    yield found
                    found = keys_array()
        if found:
            yield found
