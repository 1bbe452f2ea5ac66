"""Traces: what is read, which prompts are equal, and which lines are refused."""

import json

import pytest

from tests.llm.replay.traces import chats, trace
from triton_distributed.llm import InvalidParameter, unpacked
from triton_distributed.llm.replay import Trace, read_trace
from triton_distributed.llm.routing.keys import block_keys

GOOD = {"timestamp": 27000, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 2353]}


def written(path, *lines):
    path.write_text("\n".join(json.dumps(each) if isinstance(each, dict) else each for each in lines))
    return path


def test_requests_are_read_in_the_order_of_arrival(tmp_path):
    later = {**GOOD, "timestamp": 30500, "output_length": 0}
    found = read_trace(written(tmp_path / "some.jsonl", later, "", {**GOOD, "more": 1}))
    assert found.name == "some"
    assert [each.at_s for each in found.requests] == [27.0, 30.5]
    assert [each.answer_tokens for each in found.requests] == [52, 1], "an engine makes at least one token"
    assert found.requests[0].blocks == found.requests[1].blocks


def test_a_block_counts_with_all_blocks_before_it(tmp_path):
    other = {**GOOD, "hash_ids": [9, 47, 2353]}
    first, second = read_trace(written(tmp_path / "some.jsonl", GOOD, other)).requests
    assert not set(first.blocks) & set(second.blocks)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "Input data was truncated"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1}', "missing required field `hash_ids`"),
        ({**GOOD, "timestamp": -1}, "timestamp: expected milliseconds from 0 on, got -1"),
        ({**GOOD, "input_length": 0, "hash_ids": []}, "input_length: expected at least 1, got 0"),
        ({**GOOD, "output_length": -2}, "output_length: expected at least 0, got -2"),
        ({**GOOD, "hash_ids": [1]}, "hash_ids: 1100 tokens have 3 blocks of 512, and there are 1 ids"),
        ({**GOOD, "hash_ids": [1, 2, "x"]}, "Expected `int`, got `str`"),
    ],
)
def test_an_invalid_line_is_named(tmp_path, line, problem):
    with pytest.raises(InvalidParameter) as caught:
        read_trace(written(tmp_path / "some.jsonl", GOOD, line))
    assert "some.jsonl, line 2: " in str(caught.value)
    assert problem in str(caught.value)


def test_an_empty_trace_is_refused(tmp_path):
    with pytest.raises(InvalidParameter, match="there is no request in"):
        read_trace(written(tmp_path / "some.jsonl", ""))
    with pytest.raises(InvalidParameter, match="block_tokens: expected at least 8, got 4"):
        Trace(trace(chats(1)).requests, block_tokens=4)


@pytest.mark.parametrize("block_tokens", [16, 64, 512])
def test_prompts_are_equal_where_the_keys_are(block_tokens):
    found = trace(chats(30))
    simulated: dict[int, int] = {}
    real: dict[int, int] = {}
    for each in found.requests:
        prompt = found.prompt(each)
        assert len(unpacked(prompt)) == each.prompt_tokens
        keys = found.keys(each, block_tokens)
        assert len(keys) == each.prompt_tokens // block_tokens
        for key, hashed in zip(keys, block_keys(prompt, block_tokens), strict=True):
            assert simulated.setdefault(key, hashed) == hashed
            assert real.setdefault(hashed, key) == key
