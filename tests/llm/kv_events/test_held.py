"""Which blocks of prompts a cache holds, against a naive model."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from typing import Any

import pytest

from triton_distributed.llm.contract.cache import BlocksRemoved, BlocksStored, CacheCleared, CacheEvent
from triton_distributed.llm.contract.request import packed
from triton_distributed.llm.kv_events.change import Change
from triton_distributed.llm.kv_events.held import HeldBlocks
from triton_distributed.llm.routing.keys import block_keys, seed_of

Prompt = tuple[int, ...]


class Copy:
    """What a router makes of the changes."""

    def __init__(self) -> None:
        self.keys: set[int] = set()

    def take(self, change: Change) -> None:
        assert not set(change.stored) & set(change.removed)
        if change.cleared:
            self.keys.clear()
        assert set(change.removed) <= self.keys
        self.keys -= set(change.removed)
        self.keys |= set(change.stored)


def name(prompt: Prompt, form: type) -> int | bytes:
    """An engine's name of the block at whose end a prompt stands."""
    text = repr(prompt).encode()
    return hash(text) if form is int else text


def stored(prompt: Prompt, size: int, first: int = 0, form: type = int, **more: Any) -> BlocksStored:
    """The event for the blocks of a prompt from `first` on."""
    ends = range((first + 1) * size, len(prompt) + 1, size)
    return BlocksStored(
        hashes=[name(prompt[:end], form) for end in ends],
        parent=name(prompt[: first * size], form) if first else None,
        tokens=packed(prompt[first * size : len(prompt) // size * size]),
        block_tokens=size,
        **more,
    )


def removed(*prompts: Prompt, form: type = int, **more: Any) -> BlocksRemoved:
    return BlocksRemoved(hashes=[name(each, form) for each in prompts], **more)


def keys(prompt: Prompt, size: int = 4, seed: int = seed_of()) -> list[int]:
    return block_keys(packed(prompt), size, seed)


A = tuple(range(16))


@pytest.mark.parametrize("form", [int, bytes])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_blocks_of_every_size_have_the_keys_of_the_prompt(size: int, form: type) -> None:
    held = HeldBlocks(4)
    change = held.apply([stored(A[:8], size, form=form), stored(A, size, 8 // size, form=form)])
    assert (change.stored.tolist(), change.removed.tolist(), change.cleared) == (keys(A), [], False)
    ends = range(16, 8, -size)
    change = held.apply([removed(*(A[:end] for end in ends), form=form)])
    assert change.removed.tolist() == keys(A)[:1:-1]
    assert len(held) == 8 // size


def test_a_branch_in_the_middle_of_a_joined_block_has_the_tokens_before_it() -> None:
    held = HeldBlocks(4)
    other = (*A[:6], 77, 78, 79, 80)
    held.apply([stored(A, 2)])
    assert held.apply([stored(other, 2, 3)]).stored.tolist() == keys(other)[1:]
    further = (*other[:8], 1, 2)
    assert held.apply([stored(further, 2, 4)]).stored.tolist() == []  # No whole key yet.
    assert held.apply([stored((*further, 3, 4), 2, 5)]).stored.tolist() == keys((*further, 3, 4))[2:]


def test_blocks_after_a_missing_one_do_not_count_until_it_is_back() -> None:
    held, copy = HeldBlocks(4), Copy()
    branch = (*A[:12], 5, 5, 5, 5)
    copy.take(held.apply([stored(A, 4), stored(branch, 4, 3)]))
    assert copy.keys == {*keys(A), *keys(branch)}
    copy.take(held.apply([removed(A[:8])]))
    assert copy.keys == {*keys(A)[:1]}
    copy.take(held.apply([removed(A)]))
    assert copy.keys == {*keys(A)[:1]}
    copy.take(held.apply([stored(A[:8], 4, 1)]))
    assert copy.keys == {*keys(branch)}
    assert (held.orphans, held.unknown) == (0, 0)


def test_a_block_that_the_engine_holds_twice_stays_until_both_are_removed() -> None:
    held = HeldBlocks(4)
    held.apply([stored(A, 4), stored(A, 4)])
    assert not held.apply([removed(A)])
    assert held.apply([removed(A)]).removed.tolist() == keys(A)[3:]
    assert not held.apply([removed(A)])
    assert held.unknown == 1


def test_what_comes_back_in_the_same_batch_has_not_changed() -> None:
    held = HeldBlocks(4)
    held.apply([stored(A, 4)])
    assert not held.apply([removed(A), stored(A, 4, 3)])
    new = (*A, 1, 2, 3, 4)
    assert not held.apply([stored(new, 4, 4), removed(new)])
    change = held.apply([removed(A), stored(A, 4, 3), removed(A), removed(A[:12]), stored(A[:12], 4, 2)])
    assert (change.stored.tolist(), change.removed.tolist()) == ([], keys(A)[3:])


def test_blocks_after_an_unknown_one_are_counted_and_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    held = HeldBlocks(4)
    assert not held.apply([stored(A, 4, 2), stored(A, 4, 2)])
    assert (held.orphans, len(held)) == (4, 0)
    assert [each.levelname for each in caplog.records] == ["WARNING"]
    assert not held.apply([removed(A)])
    assert held.unknown == 1


def test_events_without_blocks_change_nothing() -> None:
    held = HeldBlocks(4)
    held.apply([stored(A, 4)])
    nothing = BlocksStored(hashes=[], parent=name(A, int), tokens=b"", block_tokens=4)
    assert not held.apply([nothing, BlocksStored(hashes=[], parent=None, tokens=b"", block_tokens=4), removed()])
    assert set().union(*held.snapshot()) == set(keys(A))
    held.apply([removed(A), removed(A[:12]), removed(A[:8]), removed(A[:4])])
    assert (len(held), list(held.snapshot()), held.malformed) == (0, [], 0)


def test_a_cleared_cache_holds_nothing() -> None:
    held = HeldBlocks(4)
    held.apply([stored(A, 4)])
    change = held.apply([removed(A), CacheCleared(), stored(A[:4], 4)])
    assert (change.cleared, change.stored.tolist(), change.removed.tolist()) == (True, keys(A)[:1], [])
    assert b"".join(map(bytes, held.snapshot())) == array("Q", keys(A)[:1]).tobytes()


@pytest.mark.parametrize(
    "event",
    [
        BlocksStored(hashes=[1, 2], parent=None, tokens=packed(A[:4]), block_tokens=4),
        BlocksStored(hashes=[1, 1], parent=None, tokens=packed(A[:8]), block_tokens=4),
        BlocksStored(hashes=[1], parent=None, tokens=b"", block_tokens=0),
        BlocksStored(hashes=[1], parent=None, tokens=b"", block_tokens=-4),
    ],
)
def test_an_event_that_contradicts_itself_is_passed_over(event: BlocksStored) -> None:
    held = HeldBlocks(4)
    assert not held.apply([event])
    assert (held.malformed, len(held)) == (1, 0)
    assert held.apply([stored(A, 4)]).stored.tolist() == keys(A)


def test_adapters_namespaces_and_images_share_no_key() -> None:
    held = HeldBlocks(4)
    found = []
    salts: list[dict[str, Any]] = [{}, {"lora": "x"}, {"namespace": "x"}, {"lora": "x", "namespace": "x"}]
    for first, more in enumerate(salts):
        event = stored((first, *A[1:]), 4, **more)
        event.tokens = packed(A)
        found.append(held.apply([event]).stored.tolist())
        assert found[-1] == keys(A, seed=seed_of(**more))
    image = stored((9, *A[1:]), 4, extra={2: b"a"})
    image.tokens = packed(A)
    found.append(held.apply([image]).stored.tolist())
    assert found[-1][:2] == keys(A)[:2]  # They come before the image.
    other = stored((8, *A[1:]), 4, extra={2: b"b"})
    other.tokens = packed(A)
    found.append(held.apply([other]).stored.tolist())
    assert len({key for each in found for key in each[2:]}) == 12


def test_a_group_without_full_attention_yields_no_key() -> None:
    held = HeldBlocks(4)
    assert not held.apply([stored(A, 4, group=1, full=False), stored(A, 4, full=False)])
    assert held.apply([stored(A, 4, group=0, full=True)]).stored.tolist() == keys(A)
    assert not held.apply([stored(A, 4, group=2, full=True), removed(A, group=1), removed(A, group=2)])
    assert held.ignored == 5
    assert held.apply([removed(A, group=0)]).removed.tolist() == keys(A)[3:]


def test_of_several_groups_of_unknown_kinds_none_counts() -> None:
    held = HeldBlocks(4)
    assert held.apply([stored(A, 4, group=0)]).stored.tolist() == keys(A)
    change = held.apply([stored(A, 4, group=1), stored((1, *A[1:]), 4, group=0)])
    assert (change.cleared, list(change.stored), held.ambiguous) == (True, [], True)
    assert held.apply([stored(A, 4, group=1, full=True)]).stored.tolist() == keys(A)  # Now the engine tells.
    assert not held.ambiguous


def test_a_group_of_unknown_kind_gives_way_to_one_with_full_attention() -> None:
    held = HeldBlocks(4)
    held.apply([stored((1, *A[1:]), 4, group=0)])
    change = held.apply([stored(A, 4, group=1, full=True)])
    assert (change.cleared, change.stored.tolist()) == (True, keys(A))


def test_the_number_of_blocks_is_bounded() -> None:
    held = HeldBlocks(4, max_blocks=3)
    assert held.apply([stored(A[:8], 4)])
    assert not held.apply([stored(A, 4, 2)])
    assert (len(held), held.dropped) == (2, 2)
    held.apply([removed(A[:8])])
    assert held.apply([stored(A[:12], 4, 1)]).stored.tolist() == keys(A)[1:3]


def test_removals_in_any_order_keep_the_promise() -> None:
    """A copy holds a key only if it holds those before it, and exactly those that the naive model has."""
    rng = random.Random(7)
    for key_tokens, size in ((4, 1), (4, 2), (4, 4), (6, 2)):
        held, copy = HeldBlocks(key_tokens), Copy()
        counts: Counter[Prompt] = Counter()
        for _ in range(200):
            events: list[CacheEvent] = []
            for _ in range(rng.randrange(1, 4)):
                if rng.random() < 0.55:
                    prompt = tuple(rng.choice((0, 0, 0, 1)) for _ in range(size * rng.randrange(1, 9)))
                    # The blocks from the first one that has a known block before it.
                    first = rng.randrange(len(prompt) // size)
                    while first and not counts[prompt[: first * size]]:
                        first -= 1
                    events.append(stored(prompt, size, first))
                    counts.update(prompt[:end] for end in range((first + 1) * size, len(prompt) + 1, size))
                elif present := [each for each, count in counts.items() if count > 0]:
                    chosen = rng.sample(present, min(len(present), rng.randrange(1, 5)))
                    chosen.sort(key=len, reverse=rng.random() < 0.5)
                    events.append(removed(*chosen))
                    counts.subtract(chosen)
            copy.take(held.apply(events))
            expected = set()
            for prompt, count in counts.items():
                ends = range(size, len(prompt) + 1, size)
                if count > 0 and all(counts[prompt[:end]] > 0 for end in ends):
                    expected.update(keys(prompt, key_tokens))
            assert copy.keys == expected
            assert set().union(*held.snapshot(5)) == expected
        for prompt in [each for each, count in counts.items() for _ in range(count)]:
            copy.take(held.apply([removed(prompt)]))
        assert (copy.keys, len(held), held.orphans, held.unknown, held.malformed) == (set(), 0, 0, 0, 0)


def test_events_of_one_block_each_remove_a_prompt_from_its_end_on() -> None:
    """As vLLM tells what it evicts. Their batch has the same effect as one event, and a branch stops it."""
    for size in (2, 4, 8):
        held, copy = HeldBlocks(4), Copy()
        branch = (*A[:8], 5, 5, 5, 5, 5, 5, 5, 5)
        copy.take(held.apply([stored(A, size), stored(branch, size, 8 // size)]))
        ends = range(16, 0, -size)
        copy.take(held.apply([removed(A[:end]) for end in ends]))
        assert copy.keys == set()  # The branch is held without its beginning.
        copy.take(held.apply([stored(A[:8], size)]))
        assert copy.keys == set(keys(branch))
        change = held.apply([removed(branch[:end]) for end in ends])
        assert change.removed.tolist() == keys(branch)[::-1]
        copy.take(change)
        assert (copy.keys, len(held), held.unknown) == (set(), 0, 0)


def test_a_snapshot_in_slices_may_be_mixed_with_changes() -> None:
    rng = random.Random(3)
    held, copy = HeldBlocks(4), Copy()
    prompts = [tuple(rng.randrange(2) for _ in range(40)) for _ in range(30)]
    for prompt in prompts:
        held.apply([stored(prompt, 4)])
    slices = held.snapshot(16)
    for prompt in prompts:
        for each in (each for _, each in zip(range(2), slices, strict=False)):
            assert len(each) <= 16
            copy.keys |= set(each)
        change = held.apply([removed(prompt[:20]), stored((*prompt[:36], 3, 3, 3, 3), 4, 9)])
        copy.keys -= set(change.removed)
        copy.keys |= set(change.stored)
    for each in slices:
        copy.keys |= set(each)
    assert copy.keys == set().union(*held.snapshot())
