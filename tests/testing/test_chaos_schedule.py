"""Schedules of faults: the same arguments give the same one, and enough workers stay well."""

from __future__ import annotations

import pytest

from harness.requests import plans
from triton_distributed.errors import ConfigError
from triton_distributed.testing.chaos import LASTING, FaultKind, Recovery, schedule
from triton_distributed.testing.chaos.schedule import well_again_s

RECOVERY = Recovery(restart_s=2.0, other_s=0.5)


def drawn(seed: int, **options):
    return schedule(seed, **{"duration_s": 30.0, "workers": 3, "faults_per_s": 5.0, "recovery": RECOVERY, **options})


def test_the_same_arguments_give_the_same_schedule_and_others_another():
    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1, kinds=[FaultKind.KILL]) != drawn(1)


def test_a_schedule_that_was_drawn_once_is_drawn_for_ever():
    first = schedule(7, duration_s=10.0, workers=3)[0]
    assert (round(first.at_s, 6), first.kind, first.worker) == (0.391315, FaultKind.STOP, 1)


@pytest.mark.parametrize("spare", [0, 1, 2, 3])
def test_so_many_workers_are_well_at_every_moment(spare):
    for seed in range(50):
        faults = drawn(seed, workers=4, spare=spare)
        assert faults
        for moment in faults:
            hurt = [
                each.worker for each in faults if each.at_s <= moment.at_s < well_again_s(each, RECOVERY)
            ]  # itself included
            assert len(hurt) == len(set(hurt)) <= 4 - spare, (seed, moment)


def test_faults_are_as_long_as_they_may_be():
    faults = drawn(3, longest_s=2.0)
    for each in faults:
        assert 0.2 <= each.seconds <= 2.0 if each.kind in LASTING else each.seconds == 0.0
        assert (each.amount > 0) == (each.kind in (FaultKind.TRUNCATE, FaultKind.CORRUPT))
        assert 0 < each.at_s < 30.0
    assert {each.kind for seed in range(5) for each in drawn(seed)} == set(FaultKind)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kinds": []}, "kinds"),
        ({"duration_s": 0.0}, "duration_s"),
        ({"faults_per_s": float("nan")}, "faults_per_s"),
        ({"longest_s": -1.0}, "longest_s"),
        ({"spare": 3}, "spare"),
        ({"spare": -1}, "spare"),
    ],
)
def test_what_makes_no_sense_is_an_error(options, words):
    with pytest.raises(ConfigError, match=words):
        drawn(1, **options)


def test_the_same_arguments_give_the_same_calls():
    one = plans(4, duration_s=10.0, calls_per_s=20.0)
    assert one == plans(4, duration_s=10.0, calls_per_s=20.0) != plans(5, duration_s=10.0, calls_per_s=20.0)
    assert len(one) == 200
    assert [each.work.id for each in one] == [*range(200)]
    assert all(each.idempotent for each in one if each.hedge_after_s is not None)
