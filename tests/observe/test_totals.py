"""Totals keep what owners have counted that are gone, and stay small."""

from __future__ import annotations

from triton_distributed.observe import CallStats, Outcome, RequestStats
from triton_distributed.observe.totals import FEW, Totals


class Owner:
    def __init__(self, totals: Totals[str, RequestStats], key: str = "a") -> None:
        self.stats, self.gone = RequestStats(), False
        totals.add(key, self.stats, lambda: self.gone)

    def count(self, duration_s: float) -> None:
        self.stats.ended[Outcome.OK] += 1
        self.stats.items += 2
        self.stats.duration.fresh.append(duration_s)


def test_what_owners_counted_stays_when_they_are_gone():
    totals = Totals[str, RequestStats](RequestStats)
    for number in range(100):
        owner = Owner(totals)
        owner.count(0.003)
        owner.gone = True
        total = totals.total("a")
        assert (total.ended[Outcome.OK], total.items, sum(total.duration.counts)) == (
            number + 1,
            2 * number + 2,
            number + 1,
        )
    assert len(list(totals.parts("a"))) <= FEW + 2
    assert abs(totals.total("a").duration.total_s - 0.3) < 1e-9


def test_one_that_still_has_requests_is_kept():
    totals = Totals[str, RequestStats](RequestStats)
    slow = Owner(totals)
    slow.gone, slow.stats.inflight = True, 1
    for _ in range(3 * FEW):
        Owner(totals).gone = True
    assert totals.total("a").inflight == 1
    slow.stats.inflight = 0
    slow.count(1.0)
    assert totals.total("a").ended[Outcome.OK] == 1


def test_many_living_owners_are_all_counted():
    totals = Totals[str, RequestStats](RequestStats)
    owners = [Owner(totals) for _ in range(10 * FEW)]
    for owner in owners:
        owner.count(0.1)
    assert totals.total("a").ended[Outcome.OK] == len(owners)


def test_keys_are_apart():
    totals = Totals[str, CallStats](CallStats)
    one, other = CallStats(), CallStats()
    totals.add("one", one, lambda: False)
    totals.add("other", other, lambda: False)
    one.retries, one.resumes, other.hedges = 1, 2, 3
    assert totals.keys == ["one", "other"]
    assert (totals.total("one").retries, totals.total("one").resumes, totals.total("one").hedges) == (1, 2, 0)
    assert totals.total("other").hedges == 3
    assert totals.total("neither").ended == [0] * len(Outcome)
