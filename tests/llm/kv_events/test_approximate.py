"""Which blocks the cache of an engine without events is believed to hold, beside an engine that evicts for real."""

from __future__ import annotations

import random
from collections import OrderedDict

from triton_distributed.llm.kv_events.approximate import AssumedBlocks

SIZE = 64


class Cache:
    """The cache of an engine: the least recently used blocks leave, the later ones of a prompt first."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.held: OrderedDict[int, None] = OrderedDict()

    def request(self, keys: list[int]) -> int:
        """Compute a prompt that ends one token after its last block. Returns its cached tokens."""
        depth = 0
        while depth < len(keys) and keys[depth] in self.held:
            depth += 1
        for key in reversed(keys):
            self.held[key] = None
            self.held.move_to_end(key)
        while len(self.held) > self.blocks:
            self.held.popitem(last=False)
        return depth * SIZE


def ask(assumed: AssumedBlocks, keys: list[int], cached: int | None = None, copy: set[int] | None = None) -> int:
    """One request and, if it is given, its usage. Returns the believed depth."""
    asked = assumed.request(keys, len(keys) * SIZE + 1)
    changes = [asked.change] if cached is None else [asked.change, assumed.usage(asked, cached)]
    if copy is not None:
        for change in changes:
            assert set(change.removed) <= copy
            assert not copy & set(change.stored)
            copy -= set(change.removed)
            copy |= set(change.stored)
    return asked.depth


def test_the_least_recently_used_blocks_leave_and_the_later_ones_of_a_prompt_first() -> None:
    assumed, copy = AssumedBlocks(SIZE, 6 * SIZE + 5), set[int]()
    assert ask(assumed, [1, 2, 3], copy=copy) == 0
    assert ask(assumed, [4, 5], copy=copy) == 0
    assert ask(assumed, [1, 2], copy=copy) == 2
    ask(assumed, [6, 7], copy=copy)
    assert copy == {1, 2, 4, 5, 6, 7}
    ask(assumed, [8], copy=copy)
    assert copy == {1, 2, 4, 6, 7, 8}
    assert len(assumed) == 6


def test_a_prompt_that_is_longer_than_the_cache_keeps_its_beginning() -> None:
    assumed, copy = AssumedBlocks(SIZE, 3 * SIZE), set[int]()
    ask(assumed, [9], copy=copy)
    ask(assumed, list(range(8)), copy=copy)
    assert copy == {0, 1, 2}
    assert ask(assumed, list(range(8)), copy=copy) == 3


def test_missing_blocks_take_those_that_were_not_used_for_longer_with_them() -> None:
    assumed, copy = AssumedBlocks(SIZE), set[int]()
    for first in (10, 20, 30, 40):
        ask(assumed, [first, first + 1], 0, copy)
    ask(assumed, [40, 41], 2 * SIZE, copy)
    ask(assumed, [20, 21], SIZE, copy)  # 21 was missing, so all before it are, too.
    assert copy == {20, 21, 30, 31, 40, 41}
    assert assumed.blocks == 6


def test_an_engine_that_never_reports_cached_tokens_is_not_believed_to_have_none() -> None:
    assumed = AssumedBlocks(SIZE)
    for _ in range(3):
        ask(assumed, [1, 2], 0)
    assert len(assumed) == 2
    assert (assumed.asked_tokens, assumed.believed_tokens, assumed.measured_tokens) == (3 * 129, 4 * SIZE, 0)


def test_the_last_token_of_a_prompt_is_never_cached() -> None:
    assumed = AssumedBlocks(SIZE)
    asked = assumed.request([1, 2], 2 * SIZE)
    assumed.usage(asked, SIZE)
    again = assumed.request([1, 2], 2 * SIZE)
    assert not assumed.usage(again, SIZE)
    assert len(assumed) == 2


def test_a_clear_between_a_request_and_its_usage_does_no_harm() -> None:
    assumed = AssumedBlocks(SIZE)
    ask(assumed, [1, 2], SIZE)
    asked = assumed.request([1, 2], 3 * SIZE)
    assert assumed.clear().cleared
    assert not assumed.usage(asked, SIZE)
    assert ask(assumed, [1]) == 0


def test_reports_teach_the_size_of_a_cache_that_the_engine_does_not_tell() -> None:
    """The belief is right for 19 of 20 tokens; without the reports it would be for half of them."""
    rng = random.Random(5)
    cache, assumed, blind = Cache(200), AssumedBlocks(SIZE, 2000 * SIZE), AssumedBlocks(SIZE, 2000 * SIZE)
    prompts = [[1000 * each + place for place in range(10)] for each in range(60)]
    wrong = dict.fromkeys((assumed, blind), 0)
    for count in range(2000):
        keys = rng.choice(prompts[: 25 if rng.random() < 0.5 else 60])
        measured = cache.request(keys)
        for each, cached in ((assumed, measured), (blind, None)):
            believed = ask(each, keys, cached) * SIZE
            if count > 500:
                wrong[each] += abs(believed - measured)
    total = 1500 * 10 * SIZE
    assert wrong[assumed] < 0.05 * total < 0.3 * total < wrong[blind]
    assert 150 < assumed.blocks < 300


def test_a_snapshot_gives_a_block_after_those_before_it() -> None:
    assumed = AssumedBlocks(SIZE)
    ask(assumed, [1, 2, 3, 4])
    ask(assumed, [1, 2, 5])
    slices = assumed.snapshot(2)
    first = next(slices)
    assumed.clear()
    assert (first.tolist(), list(slices)) == ([1, 2], [])
