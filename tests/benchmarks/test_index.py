"""The benchmark of the index: what it lets an index do, and its comparison with a naive model."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.llm.index import Ours, compared, held
from benchmarks.llm.index_work import BLOCKS, hashed, measured
from triton_distributed.llm.original.hashes import compute_block_hash_for_seq
from triton_distributed.llm.routing.index import PrefixIndex


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HOT": 3, "ASKED": 40, "EACH": 5, "CASES": 50}.items():
        monkeypatch.setattr(f"benchmarks.llm.index_work.{name}", value)
    monkeypatch.setattr("benchmarks.llm.index.EACH", 5)
    monkeypatch.setattr("benchmarks.llm.index.HELD_PROMPTS", 12)


class Forgetful(Ours):
    """It forgets the last block of each prompt."""

    def stored(self, keys: Sequence[int]) -> Any:
        return super().stored(array("Q", keys[:-1]) if len(keys) == BLOCKS else keys)


def test_every_index_does_the_same_work_and_an_index_that_differs_is_noticed():
    found = measured(Ours(), 16 * BLOCKS)
    work = {"store", "memory", "hot", "steps", "cold", "remove", "remove parts", "remove each", "clear"}
    assert set(found["figures"]) == work
    assert found == {**measured(Ours(), 16 * BLOCKS), "figures": found["figures"]}
    with pytest.raises(AssertionError):
        measured(Forgetful(), 16 * BLOCKS)


def test_what_a_worker_does_is_measured_for_each_kind_of_work():
    assert set(held("worker", 64)["figures"]) == {
        f"worker: {each}" for each in ("store", "memory", "remove", "remove each", "store each")
    }


def test_hashes_of_another_function_have_another_digest():
    ours = hashed(compute_block_hash_for_seq)
    assert ours["hashes"] > 50
    assert ours == hashed(compute_block_hash_for_seq)
    other = hashed(lambda *a, **k: [each ^ 1 for each in compute_block_hash_for_seq(*a, **k)])
    assert other["digest"] != ours["digest"]


def test_random_events_agree_with_the_naive_model(capsys: pytest.CaptureFixture[str]):
    assert compared(600) == 0
    assert "equal to the naive model" in capsys.readouterr().out


def test_random_events_tell_when_the_index_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(PrefixIndex, "discard", lambda self, worker, keys: None)
    assert compared(600) == 1
    assert capsys.readouterr().out.startswith("after ")
