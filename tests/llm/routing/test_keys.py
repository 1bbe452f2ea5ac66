"""The keys of blocks, against the vectors of the original and of Dynamo 1.6."""

from __future__ import annotations

import json
import random
from pathlib import Path

from triton_distributed.llm.contract.request import packed
from triton_distributed.llm.routing.keys import block_keys, indexed_tokens, local_hashes, seed_of, sequence_hashes

SIXTEENS = [15310707395893867146, 15292316782987903195, 5532946206955930018, 14928757266181269122]


def test_local_hashes_are_those_of_the_original() -> None:
    prompt = packed(range(64))
    assert local_hashes(prompt, 64) == [3480597578098033343]
    assert local_hashes(prompt, 16) == SIXTEENS


def test_local_hashes_are_those_of_dynamo() -> None:
    """Recorded from its binding 1.6.1: block size, number of tokens, LoRA adapter, cache namespace, hashes.

    The tokens of case n are what follows the first two random numbers of the seed n.
    """
    cases = json.loads(Path(__file__).with_name("dynamo_hashes.json").read_text(encoding="utf-8"))
    assert len(cases) == 200
    for number, (block_tokens, count, lora, namespace, hashes) in enumerate(cases):
        rng = random.Random(number)
        rng.choice(range(8))
        rng.randrange(6 * block_tokens + 3)
        prompt = rng.randbytes(4 * count)
        assert local_hashes(prompt, block_tokens, seed_of(lora, namespace)) == hashes, number


def test_the_tokens_after_the_last_whole_block_have_no_key() -> None:
    assert local_hashes(packed(range(63)), 16) == SIXTEENS[:3]
    assert block_keys(packed(range(15)), 16) == []
    assert block_keys(b"", 16) == []


def test_a_key_stands_for_all_tokens_before_it() -> None:
    keys = block_keys(packed(range(64)), 16)
    changed = block_keys(packed([99, *range(1, 64)]), 16)
    assert keys[0] == SIXTEENS[0]
    assert not set(keys) & set(changed)
    assert block_keys(packed(range(32, 64)), 16, keys[1]) == keys[2:]


def test_a_salt_shares_no_key_with_another() -> None:
    prompt = packed(range(64))
    found = [set(block_keys(prompt, 16, seed_of(salt))) for salt in ("", "a", "b")]
    found.append(set(block_keys(prompt, 16, seed_of("", "a"))))
    assert len(set.union(*found)) == 16


def test_small_blocks_are_joined() -> None:
    assert [indexed_tokens(each) for each in (0, 1, 16, 32, 48, 64, 100, 128)] == [64, 64, 64, 64, 96, 64, 100, 128]


def test_chained_hashes_begin_with_the_first_local_one() -> None:
    chained = sequence_hashes(SIXTEENS)
    assert chained[0] == SIXTEENS[0]
    assert sequence_hashes(SIXTEENS[:2]) == chained[:2]
    assert sequence_hashes([]) == []
