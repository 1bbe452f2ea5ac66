"""Calls with one value go to one instance, and only values of instances that go or come move."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_distributed.names import EndpointName, Instance
from triton_distributed.routing.affinity import SLACK, Affinity
from triton_distributed.routing.load import LoadBook

USERS = [f"user-{n}" for n in range(3000)]
ids = st.lists(st.integers(1, 2**63 - 1), min_size=2, max_size=8, unique=True)


def instances(*ids: int) -> tuple[Instance, ...]:
    return tuple(Instance(EndpointName("n", "c", "e"), each, ()) for each in ids)


def chosen(user: object, *ids: int, load: LoadBook | None = None, spill: float = 2.0) -> int:
    return Affinity("user", spill=spill)(None, instances(*ids), load or LoadBook(), {"user": user}).id


@given(ids, st.text(), st.randoms())
def test_the_order_of_the_instances_does_not_matter(ids: list[int], user: str, rng: random.Random) -> None:
    shuffled = rng.sample(ids, len(ids))
    assert chosen(user, *ids) == chosen(user, *shuffled)


@given(ids, st.text())
def test_only_the_values_of_an_instance_that_goes_move(ids: list[int], user: str) -> None:
    before = chosen(user, *ids)
    for gone in ids:
        after = chosen(user, *[each for each in ids if each != gone])
        assert after == before or gone == before


@pytest.mark.parametrize("ids", [(1, 2, 3), (2**40 + 1, 2**40 + 2, 2**62), tuple(range(100, 110))])
def test_every_instance_gets_its_share(ids: tuple[int, ...]) -> None:
    shares = Counter(chosen(user, *ids) for user in USERS)
    mean = len(USERS) / len(ids)
    assert all(abs(shares[each] - mean) < 5 * math.sqrt(mean) for each in ids)  # five standard deviations


def test_the_choice_is_the_same_in_every_process_and_release() -> None:
    assert [chosen(user, 11, 22, 33, 44) for user in ("ada", "bob", 7, "7", "é")] == [33, 11, 11, 11, 22]


def test_a_call_without_the_key_goes_to_the_least_loaded() -> None:
    load = LoadBook()
    load.acquire(1)
    policy = Affinity("user")
    assert policy(None, instances(1, 2), load, {"other": 1}).id == 2
    assert {policy(None, instances(1, 2), LoadBook(), {}).id for _ in range(2)} == {1, 2}


def busy(load: LoadBook, instance_id: int, streams: int) -> None:
    for _ in range(streams):
        load.acquire(instance_id)


def test_an_instance_that_is_far_more_loaded_is_left_for_the_next() -> None:
    load, all_ids = LoadBook(), (1, 2, 3)
    first = chosen("ada", *all_ids)
    second = chosen("ada", *[each for each in all_ids if each != first])
    busy(load, first, SLACK)
    assert chosen("ada", *all_ids, load=load) == first  # a few streams mean nothing
    busy(load, first, 40)
    assert chosen("ada", *all_ids, load=load) == second
    assert chosen("ada", *all_ids, load=load, spill=math.inf) == first
    for each in all_ids:
        busy(load, each, 40)  # now all are loaded, and it is not far above the others
    assert chosen("ada", *all_ids, load=load) == first


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.floats(1, 4), st.text())
def test_at_any_load_there_is_a_choice(loads: list[int], spill: float, user: str) -> None:
    load = LoadBook()
    for instance_id, streams in enumerate(loads, 1):
        busy(load, instance_id, streams)
    assert chosen(user, *range(1, len(loads) + 1), load=load, spill=spill) in range(1, len(loads) + 1)


def test_a_spill_that_no_instance_could_keep_is_refused() -> None:
    for wrong in (0.5, float("nan")):
        with pytest.raises(ValueError, match="spill="):
            Affinity("user", spill=wrong)
