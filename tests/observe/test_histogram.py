"""Histograms: exact counts, whichever thread counts, and the quantiles of what was counted."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_distributed.observe import BOUNDS_S, CallStats, Histogram, RequestStats, quantile

durations = st.lists(st.floats(0, 1000), max_size=50)


@given(durations)
def test_each_duration_is_in_the_bucket_of_the_first_bound_that_is_not_below_it(found):
    histogram = Histogram()
    histogram.fresh += found
    histogram.count()
    expected = [0] * (len(BOUNDS_S) + 1)
    for each in found:
        expected[next((i for i, bound in enumerate(BOUNDS_S) if each <= bound), len(BOUNDS_S))] += 1
    assert histogram.counts == expected
    assert histogram.total_s == pytest.approx(sum(found))
    assert histogram.fresh == []


class Ascending(list[float]):
    """Durations that are looked at when they are counted, even if there are none."""

    looks = 0

    def __len__(self) -> int:
        self.looks += 1
        return super().__len__()


def test_an_idle_histogram_is_not_counted_again():
    """All of a process are looked at each second, on its loop."""
    idle, counted = Histogram(), Ascending()
    idle.add(counted)
    assert counted.looks < len(BOUNDS_S)


def test_nothing_is_lost_or_counted_twice_while_another_thread_adds():
    stats = CallStats()
    number, over = 20_000, threading.Event()

    def add() -> None:
        for _ in range(number):
            stats.whole.append(0.001)
        over.set()

    thread = threading.Thread(target=add)
    thread.start()
    while not over.is_set():
        stats.count()
    thread.join()
    stats.count()
    assert sum(stats.duration.counts) == sum(stats.first_item.counts) == number


def test_a_count_in_the_middle_of_a_count_is_left_out():
    """The collector may run anywhere, and a stream that it finds ends its call, whose time is counted."""
    stats = CallStats()

    class Ends(float):
        def __lt__(self, other: float) -> bool:
            stats.whole.append(0.5)
            stats.try_count()
            return super().__lt__(other)

    stats.whole += [Ends(0.001), Ends(0.002)]
    stats.try_count()
    assert sum(stats.duration.counts) == 2
    kept = len(stats.whole)
    assert kept > 0
    stats.count()
    assert sum(stats.duration.counts) == 2 + kept


def test_requests_that_did_not_wait_are_counted_as_such():
    stats = RequestStats()
    stats.whole += [0.001] * 10
    stats.duration.fresh += [0.3] * 5
    stats.queue_wait.fresh += [0.25] * 4
    stats.loop_wait.fresh += [0.002] * 3
    for _ in range(2):  # Counting again changes nothing.
        stats.count()
        assert stats.queue_wait.counts[0] == 11
        assert (sum(stats.queue_wait.counts), stats.queue_wait.total_s) == (15, 1.0)
        assert stats.loop_wait.counts[BOUNDS_S.index(0.0005)] == 12
        assert (sum(stats.loop_wait.counts), sum(stats.first_item.counts)) == (15, 10)


@given(durations.filter(bool), st.floats(0, 1))
def test_a_quantile_is_in_the_bucket_of_the_exact_one(found, q):
    histogram = Histogram()
    histogram.fresh += found
    histogram.count()
    exact = sorted(found)[max(0, -int(-q * len(found) // 1) - 1)]
    index = next((i for i, bound in enumerate(BOUNDS_S) if exact <= bound), None)
    estimate = quantile(histogram.counts, q)
    assert estimate is not None
    if index is None:
        assert estimate == BOUNDS_S[-1]
    else:
        assert (BOUNDS_S[index - 1] if index else 0) <= estimate <= BOUNDS_S[index]


def test_no_duration_has_no_quantile():
    assert quantile(Histogram().counts, 0.5) is None
