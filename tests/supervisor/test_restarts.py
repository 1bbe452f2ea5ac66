"""When a replica that has ended starts again."""

from __future__ import annotations

import pytest

from triton_distributed.supervisor.restarts import FAILING, LONGEST_S, STEADY_S, Restarts


def test_the_first_end_costs_no_time_and_each_further_one_twice_the_last():
    restarts = Restarts(lambda: 1.0)
    assert [restarts.ended(0.0) for _ in range(9)] == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_a_replica_that_was_ready_for_long_begins_anew():
    restarts = Restarts(lambda: 1.0)
    for _ in range(FAILING):
        restarts.ended(STEADY_S - 0.1)
    assert restarts.failing
    assert restarts.ended(STEADY_S) == 0.0
    assert not restarts.failing


def test_it_is_failing_after_some_ends_in_a_row():
    restarts = Restarts(lambda: 1.0)
    states = []
    for _ in range(FAILING):
        restarts.ended(0.0)
        states.append(restarts.failing)
    assert states == [False] * (FAILING - 1) + [True]


@pytest.mark.parametrize(("drawn", "share"), [(0.0, 0.5), (0.5, 0.75), (1.0, 1.0)])
def test_chance_spreads_the_starts_over_half_of_the_time(drawn, share):
    restarts = Restarts(lambda: drawn)
    restarts.ended(0.0)
    assert restarts.ended(0.0) == pytest.approx(0.5 * share)


def test_thousands_of_ends_are_no_problem():
    restarts = Restarts(lambda: 1.0)
    assert [restarts.ended(0.0) for _ in range(5000)][-1] == LONGEST_S
