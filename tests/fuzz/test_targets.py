"""Every fuzz target takes its seeds and some thousand mutations of them; `make fuzz` goes on from there."""

from __future__ import annotations

import importlib
import itertools
import random

import pytest

from tests.fuzz.__main__ import MAX_INPUT, TARGETS
from tests.fuzz.mutation import mutations


@pytest.mark.parametrize("name", TARGETS)
def test_target_holds(name):
    target = importlib.import_module(f"tests.fuzz.fuzz_{name}")
    assert target.SEEDS, "a target starts from something well-formed"
    for data in itertools.islice(mutations(target.SEEDS, random.Random(17), MAX_INPUT), 2000):
        target.one_input(data)


def test_mutations_stay_short_and_differ():
    made = list(itertools.islice(mutations([b"abc" * 100], random.Random(1), 500), 1000))
    assert max(map(len, made)) <= 500
    assert len(set(made)) > 900
