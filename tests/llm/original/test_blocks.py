"""`RadixTree`, the hashes of blocks, the cost of the original, and blocks that are assumed to be held."""

from __future__ import annotations

import json
import random
import threading
from typing import Any

import pytest

from triton_distributed.llm import (
    RadixTree,
    compute_block_hash_for_seq,
    compute_block_hash_for_seq_py,
)
from triton_distributed.llm.original.blocks import Blocks, UnknownBlocks
from triton_distributed.llm.original.costs import Loads
from triton_distributed.llm.original.indexers import Assumed
from triton_distributed.llm.original.messages import Change, KvCacheEvent, Load, Removed, Stored, StoredBlock

A, B = (1, 0), (2, 0)

IMAGES = [9143094415614847814, 12850446198157491111, 1088361764653601668]
EAGLE = [14562210786876287112, 15916330181359808192, 14047779161337223320]


def event(data: Any, number: int = 1, **more: Any) -> bytes:
    return json.dumps({"event_id": number, "data": data, **more}).encode()


def stored(parent: int | None, *blocks: tuple[int, int]) -> dict[str, Any]:
    found = [{"block_hash": name, "tokens_hash": tokens} for name, tokens in blocks]
    return {"stored": {"parent_hash": parent, "blocks": found}}


def test_a_tree_as_programs_of_dynamo_use_it() -> None:
    tree = RadixTree()
    tree.apply_event(0, event(stored(None, (0, 0))))
    assert tree.find_matches([0]).scores == {(0, 0): 1}
    dumped = tree.dump_tree_as_events()
    assert len(dumped) == 1
    assert json.loads(dumped[0]) == {
        "worker_id": 0,
        "event": {
            "event_id": 0,
            "data": {"stored": {"blocks": [{"block_hash": 0, "tokens_hash": 0}], "parent_hash": None}},
        },
    }
    tree.remove_worker(0)
    assert tree.dump_tree_as_events() == []
    assert tree.find_matches([0]).scores == {}


def test_names_of_engines_only_link_blocks_to_parents() -> None:
    """Two engines have different names for the same tokens, and one engine's names mean nothing at another one."""
    tree = RadixTree()
    tree.apply_event(1, event(stored(None, (10, 1), (11, 2), (12, 3))))
    tree.apply_event(2, event(stored(None, (777, 1)), dp_rank=3))
    tree.apply_event(2, event(stored(777, (778, 2)), dp_rank=3))
    assert tree.find_matches([1, 2, 3, 4]).scores == {(1, 0): 3, (2, 3): 2}
    assert tree.find_matches([2, 3]).scores == {}
    with pytest.raises(RuntimeError, match="the parent block 10 is unknown"):
        tree.apply_event(2, event(stored(10, (5, 5))))
    with pytest.raises(RuntimeError, match="2 of 3 removed blocks are unknown"):
        tree.apply_event(1, event({"removed": {"block_hashes": [12, 98, 99]}}))
    assert tree.find_matches([1, 2, 3]).scores == {(1, 0): 2, (2, 3): 2}


def test_a_block_that_is_removed_in_the_middle_hides_its_children_until_it_is_back() -> None:
    tree = RadixTree()
    tree.apply_event(1, event(stored(None, (10, 1), (11, 2), (12, 3))))
    tree.apply_event(1, event({"removed": {"block_hashes": [11]}}))
    assert tree.find_matches([1, 2, 3]).scores == {A: 1}
    assert [
        json.loads(each)["event"]["data"]["stored"]["blocks"][0]["block_hash"] for each in tree.dump_tree_as_events()
    ] == [10]
    tree.apply_event(1, event(stored(10, (11, 2))))
    assert tree.find_matches([1, 2, 3]).scores == {A: 3}
    assert len(tree.dump_tree_as_events()) == 3
    tree.apply_event(1, event("cleared"))
    assert tree.find_matches([1]).scores == {}
    tree.apply_event(1, event(stored(None, (10, 1))))
    tree.clear_all_blocks(1)
    assert tree.find_matches([1]).scores == {}


def test_a_dump_makes_an_equal_tree() -> None:
    tree, copy = RadixTree(), RadixTree()
    for worker in (1, 2):
        tree.apply_event(worker, event(stored(None, (10, 1), (11, 2))))
        tree.apply_event(worker, event(stored(10, (20, 7), (21, worker))))
    for each in map(json.loads, tree.dump_tree_as_events()):
        copy.apply_event(each["worker_id"], json.dumps(each["event"]).encode())
    for path in ([1, 2], [1, 7, 1], [1, 7, 2], [7]):
        assert copy.find_matches(path).scores == tree.find_matches(path).scores


def test_what_is_no_event_is_refused() -> None:
    tree = RadixTree()
    for bad in (
        b"nonsense",
        b"\xff",
        b"{}",
        event("other"),
        event(stored(None, (-1, 1))),
        event(stored(None, (1, 2**64))),
    ):
        with pytest.raises(ValueError, match="Failed to deserialize KvCacheEvent"):
            tree.apply_event(1, bad)
    with pytest.raises(ValueError, match="do not expire"):
        RadixTree(expiration_duration_secs=1.0)  # type: ignore[arg-type]


def test_threads_may_use_one_tree() -> None:
    tree = RadixTree()

    def work(worker: int) -> None:
        tree.apply_event(worker, event(stored(None, *((n, n) for n in range(50)))))
        tree.find_matches(range(50))

    threads = [threading.Thread(target=work, args=(each,)) for each in range(16)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert tree.find_matches(range(50)).scores == {(each, 0): 50 for each in range(16)}


def test_blocks_equal_a_simple_model_under_random_events() -> None:
    rng = random.Random(14)
    blocks = Blocks()
    model: dict[tuple[int, int], dict[int, tuple[int, ...]]] = {A: {}, B: {}}  # Name → the hashes of the path.
    for number in range(3000):
        worker = rng.choice((A, B))
        held = model[worker]
        what = rng.random()
        if what < 0.6:
            parent = rng.choice([None, *held]) if held else None
            name, tokens = number, rng.randrange(3)
            change = Change(stored=Stored([StoredBlock(name, tokens)], parent))
            path = (*held[parent], tokens) if parent is not None else (tokens,)
            if path in held.values():
                continue  # An engine names each block once.
            held[name] = path
        elif what < 0.99:
            gone = rng.sample(sorted(held), min(len(held), 3))
            change = Change(removed=Removed(gone))
            for each in gone:
                del held[each]
        else:
            blocks.forget(worker[0])
            held.clear()
            continue
        blocks.apply(worker[0], KvCacheEvent(number, change))
        if number % 20 == 0:
            prompt = [rng.randrange(3) for _ in range(6)]
            for of, paths in model.items():
                depth = 0
                while depth < 6 and tuple(prompt[: depth + 1]) in paths.values():
                    depth += 1
                assert blocks.depths(prompt).get(of, 0) == depth
    assert len(blocks) == sum(map(len, model.values()))


def test_a_name_that_an_engine_gives_to_another_block() -> None:
    tree = RadixTree()
    tree.apply_event(1, event(stored(None, (0, 5))))
    tree.apply_event(1, event(stored(None, (0, 6))))
    assert tree.find_matches([5]).scores == {}
    assert tree.find_matches([6]).scores == {A: 1}


def test_a_bound_of_blocks_holds() -> None:
    blocks = Blocks(max_blocks=3)
    blocks.apply(1, KvCacheEvent(1, Change(stored=Stored([StoredBlock(n, n) for n in range(5)]))))
    assert len(blocks) == 3
    assert blocks.depths(range(5)) == {A: 3}
    with pytest.raises(UnknownBlocks):
        blocks.apply(1, KvCacheEvent(2, Change(removed=Removed([4]))))


# --- hashes ----------------------------------------------------------------------------------------------------------


def test_hashes_as_programs_of_dynamo_compute_them() -> None:
    assert compute_block_hash_for_seq_py(range(64), 64) == [3480597578098033343]
    assert compute_block_hash_for_seq(range(64), 64) == [3480597578098033343]
    assert compute_block_hash_for_seq(range(16), 16, lora_name="x") == [16171004664899795268]
    assert compute_block_hash_for_seq(range(16), 16, cache_namespace="x") == [7196494142689875176]
    assert compute_block_hash_for_seq(range(16), 16, lora_name="") == [15310707395893867146]
    images = [None, {"mm_objects": [{"mm_hash": 9, "offsets": []}, {"mm_hash": 5, "offsets": []}]}]
    # Recorded from Dynamo's binding 1.6.1.
    assert compute_block_hash_for_seq(range(12), 4, images) == IMAGES
    assert compute_block_hash_for_seq(range(13), 4, is_eagle=True) == EAGLE


@pytest.mark.parametrize(
    ("tokens", "size", "error"),
    [
        ([1], 0, ValueError),
        ([1], -1, ValueError),
        ([-1], 1, OverflowError),
        ([2**32], 1, OverflowError),
        (["a"], 1, TypeError),
    ],
)
def test_invalid_tokens_and_sizes(tokens: list[Any], size: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        compute_block_hash_for_seq(tokens, size)


# --- cost ------------------------------------------------------------------------------------------------------------


def cost(loads: list[tuple[int, int, int, int]], at: int, overlap: int, tokens: int) -> float:
    """The formula, written anew."""
    mean = sum(each[2] for each in loads) / len(loads)
    deviation = (sum((each[2] - mean) ** 2 for each in loads) / len(loads)) ** 0.5
    alpha = 0.7 if deviation > 0.1 * mean else 0.3
    active, slots, used, blocks = loads[at]
    return alpha * (used / blocks - mean) + (1 - alpha) * max(0, tokens - 64 * overlap) / tokens + 0.1 * active / slots


def test_the_cost_is_the_original_s() -> None:
    rng = random.Random(3)
    for _ in range(500):
        count = rng.randrange(1, 6)
        values = [
            (rng.randrange(5), rng.randrange(1, 6), rng.randrange(50), rng.randrange(1, 60)) for _ in range(count)
        ]
        overlap = {at: rng.randrange(6) for at in range(count) if rng.random() < 0.7}
        tokens = rng.choice([10, 64, 640])
        loads = Loads()
        loads.by_worker.update({at: Load(*each) for at, each in enumerate(values)})
        free = [at for at, each in enumerate(values) if each[0] < each[1] and each[2] < each[3]]
        best = min(free, key=lambda at: cost(values, at, overlap.get(at, 0), tokens), default=None)
        assert loads.choose(overlap, tokens) == best
        for at, (active, slots, used, blocks) in enumerate(values):
            more = int(at == best)
            assert loads.by_worker[at] == Load(active + more, slots, used + more * min(tokens // 64, 1), blocks)


def test_an_empty_prompt_gets_a_worker_and_an_unpublished_worker_no_request() -> None:
    loads = Loads()
    assert loads.choose({}, 64) is None
    loads.by_worker.update({1: Load(), 2: Load(0, 4, 0, 4)})
    assert loads.choose({}, 0) == 2
    assert loads.choose({1: 1}, 64) == 2


def test_equal_workers_take_turns() -> None:
    loads = Loads()
    chosen = []
    for _ in range(6):
        loads.by_worker.update({each: Load(0, 4, 0, 4) for each in (1, 2, 3)})  # Each has told that it is idle again.
        chosen.append(loads.choose({}, 64))
    assert chosen == [1, 2, 3] * 2


# --- assumed blocks --------------------------------------------------------------------------------------------------


def test_assumed_blocks_expire_after_their_last_use() -> None:
    assumed = Assumed(120.0, 100)
    assumed.use(A, [1, 2, 3], now=0.0)
    assumed.use(B, [1], now=50.0)
    assumed.use(A, [1, 2], now=100.0)
    assert assumed.depths([1, 2, 3], now=119.0) == {A: 3, B: 1}
    assert assumed.depths([1, 2, 3], now=121.0) == {A: 2, B: 1}
    assert assumed.depths([1, 2, 3], now=171.0) == {A: 2}
    assert assumed.depths([1, 2, 3], now=220.0) == {}


def test_the_blocks_that_were_used_least_lately_leave_first_and_the_last_of_a_prompt_before_its_first() -> None:
    assumed = Assumed(120.0, 4)
    assumed.use(A, [1, 2, 3], now=0.0)
    assumed.use(B, [7, 8], now=0.0)
    assert assumed.depths([1, 2, 3], now=1.0) == {A: 2}
    assert assumed.depths([7, 8], now=1.0) == {B: 2}
    assumed.use(A, range(100, 110), now=2.0)
    assert assumed.depths(range(100, 110), now=2.0) == {A: 4}
