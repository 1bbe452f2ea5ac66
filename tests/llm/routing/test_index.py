"""The index of prefixes, against a naive model, and its bounds."""

from __future__ import annotations

import random

import pytest

from triton_distributed.llm.routing.index import PrefixIndex


class Naive:
    """A set of held prefixes for each worker."""

    def __init__(self) -> None:
        self.held: dict[int, set[int]] = {}

    def depths(self, keys: list[int]) -> dict[int, int]:
        found = {}
        for worker, held in self.held.items():
            depth = 0
            while depth < len(keys) and keys[depth] in held:
                depth += 1
            if depth:
                found[worker] = depth
        return found


def tree(rng: random.Random, chains: int, depth: int) -> list[list[int]]:
    """Prompts that share beginnings: each branches off an earlier one."""
    found = [[rng.getrandbits(64) for _ in range(depth)]]
    for _ in range(chains - 1):
        parent = rng.choice(found)
        at = rng.randrange(len(parent) + 1)
        found.append(parent[:at] + [rng.getrandbits(64) for _ in range(rng.randrange(depth))])
    return found


@pytest.mark.parametrize("seed", range(3))
def test_random_events_give_the_depths_of_a_naive_model(seed: int) -> None:
    rng = random.Random(seed)
    prompts = tree(rng, 60, 24)
    index: PrefixIndex[int] = PrefixIndex()
    naive = Naive()
    for _ in range(600):
        worker = rng.randrange(5)
        event = rng.random()
        if worker not in naive.held:
            index.add(worker)
            naive.held[worker] = set()
        prompt = rng.choice(prompts)
        held = naive.held[worker]
        if event < 0.5:
            upto = rng.randrange(len(prompt) + 1)
            index.store(worker, prompt[:upto])
            held.update(prompt[:upto])
        elif event < 0.9:
            # A worker reports all blocks that follow from a removed one, too.
            cut = rng.randrange(len(prompt) + 1)
            gone = {key for each in prompts for at, key in enumerate(each) if set(prompt[cut:]) & set(each[: at + 1])}
            index.discard(worker, gone)
            held -= gone
        elif event < 0.93:
            index.clear(worker)
            held.clear()
        elif event < 0.95:
            index.remove(worker)
            del naive.held[worker]
        index.sweep()
        asked = rng.choice(prompts)
        expected = naive.depths(asked)
        assert index.depths(asked) == expected
        assert index.walked_depths(asked) == expected
    while index.sweep():
        pass
    assert len(index) == len(set().union(*naive.held.values()))


def test_a_full_index_keeps_what_it_has_and_counts_the_rest() -> None:
    index: PrefixIndex[str] = PrefixIndex(max_entries=3)
    index.add("a")
    index.store("a", [1, 2, 3, 4, 5])
    assert (len(index), index.dropped) == (3, 2)
    assert index.depths([1, 2, 3, 4, 5]) == {"a": 3}
    index.add("b")
    index.store("b", [1, 2, 3])  # Known keys take no further entry.
    assert index.depths([1, 2, 3]) == {"a": 3, "b": 3}
    index.discard("a", [3, 2, 1])
    index.discard("b", [3])
    index.store("b", [9, 9, 1, 10])  # 1 is known, and for 10 there is no room.
    assert (len(index), index.dropped) == (3, 3)
    assert index.depths([1, 2, 9]) == {"b": 3}
    assert index.depths([10]) == {}


def test_a_worker_that_is_gone_leaves_at_once_and_its_memory_in_parts() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    index.add("a")
    index.store("a", range(10_000))
    index.remove("a")
    assert index.depths(range(10_000)) == {}
    assert len(index) == 10_000
    assert index.sweep()  # One part of many.
    assert 0 < len(index) < 10_000
    index.add("b")  # It gets a bit that no entry of `a` has.
    assert index.depths(range(10_000)) == {}
    while index.sweep():
        pass
    assert len(index) == 0


def test_a_worker_that_held_nothing_leaves_nothing_to_sweep() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    index.add("a")
    for _ in range(100):
        index.clear("a")  # As each snapshot begins.
        assert not index.sweep()
    index.store("a", [1])
    index.clear("a")
    assert index.sweep()
    assert index.depths([1]) == {}


def test_a_worker_that_was_not_added_cannot_store() -> None:
    with pytest.raises(KeyError):
        PrefixIndex[str]().store("a", [1])
