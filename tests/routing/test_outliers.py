"""Which instance fails far more than its peers, and which only has bad luck."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from triton_distributed.names import EndpointName, Instance
from triton_distributed.routing.outliers import (
    GROWTH,
    LEAST_FAILURES,
    PEER_ANSWERS,
    RATE_GAP,
    Ejection,
    Outliers,
    far_beyond,
)

ENDPOINT = EndpointName("n", "c", "e")
FIRST_S = 5.0
PERIOD_S = 60.0  # as the runtime has it


def instances(*ids: int) -> tuple[Instance, ...]:
    return tuple(Instance(ENDPOINT, each, ()) for each in ids)


THREE = instances(1, 2, 3)


def outliers(seed: int = 3) -> Outliers:
    return Outliers(random.Random(seed), FIRST_S)


def answer(table: Outliers, count: int, *ids: int) -> None:
    for each in ids:
        for _ in range(count):
            table.answered(each)


def fail(
    table: Outliers, count: int, instance_id: int = 1, now: float = 0.0, known: tuple[Instance, ...] = THREE
) -> Ejection | None:
    """So many failures of one; the last may eject it."""
    for _ in range(count - 1):
        assert table.failed(instance_id, now, known) is None
    return table.failed(instance_id, now, known)


def eject(table: Outliers, instance_id: int = 1, now: float = 0.0, known: tuple[Instance, ...] = THREE) -> Ejection:
    """Eject one of the instances: it fails five times in a row, while each of the others answers 20 calls."""
    table.failed(instance_id, now, known)
    answer(table, PEER_ANSWERS, *(each.id for each in known if each.id != instance_id))
    ejection = fail(table, LEAST_FAILURES - 1, instance_id, now, known)
    assert ejection is not None
    return ejection


# --- which instance --------------------------------------------------------------------------------------------------


def test_an_instance_that_always_fails_is_ejected_and_the_reason_has_the_numbers() -> None:
    table = outliers()
    assert fail(table, 1, 2, 100.0) is None
    answer(table, 10, 1, 3)
    assert fail(table, 3, 2, 100.0) is None
    ejection = table.failed(2, 100.0, THREE)
    assert ejection is not None
    assert (ejection.instance_id, ejection.since, ejection.times) == (2, 100.0, 1)
    assert ejection.reason == "5 of its last 5 calls failed, of its peers' 0 of 20"
    assert 100.0 + FIRST_S / 2 <= ejection.until <= 100.0 + FIRST_S
    assert [each.id for each in table.available(THREE)] == [1, 3]
    assert set(table.ejected) == {2}
    assert table.next_return() == ejection.until


def test_an_answer_ends_the_failures_in_a_row() -> None:
    table = outliers()
    table.failed(1, 0.0, THREE)
    answer(table, 10, 2, 3)
    for _ in range(5):
        assert fail(table, LEAST_FAILURES - 2) is None
        answer(table, 20, 1, 2, 3)
    assert fail(table, LEAST_FAILURES - 1) is None, "the answers from before do not count"
    answer(table, 10, 2, 3)
    assert table.failed(1, 0.0, THREE) is not None


def test_an_instance_that_fails_every_second_call_is_ejected() -> None:
    table, number = outliers(), 0
    while not table.ejected:
        number += 1
        assert number <= 20
        ejection = table.failed(1, 0.0, THREE)
        answer(table, 1, 1)
        answer(table, 2, 2, 3)
    assert number >= 15
    assert ejection is not None
    assert ejection.reason.startswith(f"{number} of its last {2 * number - 1} calls failed, of its peers' 0 of ")


def test_failures_before_the_first_answer_of_a_peer_wait_for_it() -> None:
    table = outliers()
    assert fail(table, 30) is None
    answer(table, 10, 2, 3)
    assert table.failed(1, 0.0, THREE) is not None


def test_many_streams_of_one_lost_connection_are_one_event() -> None:
    table = outliers()
    for cause in range(LEAST_FAILURES):
        assert not table.ejected
        for _ in range(100):
            table.failed(1, 0.0, THREE, cause)
        answer(table, 10, 2, 3)
    assert set(table.ejected) == {1}


def test_without_peers_to_compare_to_no_instance_is_ejected() -> None:
    table = outliers()
    for known in (instances(1), instances(1, 2)):
        assert not any(table.failed(1, 0.0, known) for _ in range(100))


def test_what_is_forgotten_does_not_count() -> None:
    table = outliers()
    fail(table, LEAST_FAILURES - 1)
    answer(table, 100, 2, 3)
    table.restart()
    assert fail(table, LEAST_FAILURES - 1) is None
    answer(table, 100, 2, 3)
    assert table.failed(1, 0.0, THREE) is not None


def test_an_outage_of_everything_does_not_eject_an_instance_that_was_good_until_then() -> None:
    table = outliers()
    table.failed(1, 0.0, THREE)
    answer(table, 1000, 1, 2, 3)
    for _ in range(100):
        for each in (1, 2, 3):
            assert table.failed(each, 0.0, THREE) is None


def test_failures_of_an_instance_that_is_out_do_not_count() -> None:
    table = outliers()
    first = eject(table)
    assert not any(table.failed(1, 1.0, THREE) for _ in range(100)), "`direct`, or calls from before"
    answer(table, 3, 1)
    assert table.readmit(first.until - 0.01) == []
    assert table.readmit(first.until) == [1]
    assert table.available(THREE) is THREE
    assert table.failed(1, first.until, THREE) is None
    answer(table, 100, 2, 3)
    assert not any(table.failed(1, first.until, THREE, began=first.until - 1) for _ in range(100))
    assert fail(table, LEAST_FAILURES - 2, 1, first.until) is None, "what was before does not count"
    assert table.failed(1, first.until, THREE, began=first.until) is not None


# --- how long, and how many ------------------------------------------------------------------------------------------


def test_the_time_grows_and_shrinks_again_with_good_behaviour() -> None:
    table, now = outliers(), 0.0
    for number in range(12):
        ejection = eject(table, now=now)
        step = FIRST_S * min(2.0**number, GROWTH)
        assert step / 2 <= ejection.until - ejection.since <= step
        assert ejection.times == min(number, 6) + 1
        now = ejection.until
        assert table.readmit(now) == [1]
    for good, times in ((32, 7), (32 + 60, 6), (10_000, 1)):
        now = eject(table, now=now + FIRST_S * good).until
        assert table.ejected[1].times == times
        table.readmit(now)


@pytest.mark.parametrize(("count", "most"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (10, 5)])
def test_at_most_half_are_ejected(count: int, most: int) -> None:
    table, all_of_them = outliers(), instances(*range(1, count + 1))
    for _ in range(200):  # the first is good, all others fail
        answer(table, 10 * count, 1)
        for each in range(2, count + 1):
            table.failed(each, 0.0, all_of_them)
    assert len(table.ejected) == most
    assert len(table.available(all_of_them)) == count - most


def test_where_others_leave_some_of_the_ejected_are_called_again() -> None:
    table, four = outliers(), instances(1, 2, 3, 4)
    for instance_id in (1, 2):
        eject(table, instance_id, 10.0 * instance_id, four)
    assert [each.id for each in table.available(four)] == [3, 4]
    assert [each.id for each in table.available(instances(1, 2, 3))] == [1, 3], "the one that returns first"
    assert [each.id for each in table.available(instances(1, 2))] == [1]
    assert [each.id for each in table.available(instances(2))] == [2]
    table.forget({2, 3, 4})
    assert set(table.ejected) == {2}


class Machine(RuleBasedStateMachine):
    """Whatever happens, at most half are left out, never the last, and each returns."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.now = outliers(), 0.0
        self.known = instances(1, 2, 3, 4, 5)

    @rule(instance_id=st.integers(1, 6), count=st.integers(1, 200), cause=st.none() | st.integers(0, 3))
    def failures(self, instance_id: int, count: int, cause: int | None) -> None:
        for _ in range(count):
            before = len(self.table.ejected)
            ejection = self.table.failed(instance_id, self.now, self.known, cause)
            if ejection is not None:
                assert before < len(self.table.ejected) <= len(self.known) // 2

    @rule(instance_id=st.integers(1, 6), count=st.integers(1, 200))
    def answers(self, instance_id: int, count: int) -> None:
        answer(self.table, count, instance_id)

    @rule()
    def period_over(self) -> None:
        self.table.restart()

    @rule(passed=st.floats(0, 1000))
    def time_passes(self, passed: float) -> None:
        self.now += passed
        for instance_id in self.table.readmit(self.now):
            assert instance_id not in self.table.ejected
        due = self.table.next_return()
        assert due is None or due > self.now

    @precondition(lambda self: self.table.ejected)
    @rule()
    def all_return(self) -> None:
        self.now += FIRST_S * GROWTH
        self.table.readmit(self.now)
        assert not self.table.ejected
        assert self.table.available(self.known) is self.known

    @rule(ids=st.sets(st.integers(1, 6)))
    def change(self, ids: set[int]) -> None:
        self.known = instances(*sorted(ids))
        self.table.forget(ids)

    @invariant()
    def enough_are_left(self) -> None:
        available = self.table.available(self.known)
        assert len(available) >= len(self.known) - len(self.known) // 2
        assert set(available) <= set(self.known)
        assert set(self.known) - set(available) <= {each for each in self.known if each.id in self.table.ejected}
        assert all(0 < each.until - each.since <= FIRST_S * GROWTH for each in self.table.ejected.values())


TestMachine = Machine.TestCase


# --- chance ----------------------------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """Calls to some instances, as the runtime passes their outcomes on."""

    count: int
    per_s: float
    rate: float
    seed: int = 1
    own_rate: dict[int, float] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=dict)

    def run(self, calls: int) -> list[Ejection]:
        rng, table, all_of_them = random.Random(self.seed), outliers(self.seed), instances(*range(1, self.count + 1))
        found, now, next_s, period, weather = [], 0.0, 1.0, 0.0, 1.0
        for number in range(calls):
            now += 1 / self.per_s
            if now >= next_s:
                next_s += 1
                # Bad requests come in swarms, and now and then a dependency is away for a second.
                if not self.own_rate and (rng.random() < 0.05 or weather == 100):
                    weather = rng.choice((1, 1, 1, 4, 0.2, 100))
                table.readmit(now)
            if period and now >= period:
                table.restart()
                period = 0.0
            available = table.available(all_of_them)
            instance_id = (available[number % len(available)] if self.seed % 2 else rng.choice(available)).id
            self.calls[instance_id] = self.calls.get(instance_id, 0) + 1
            if rng.random() >= min(0.95, self.own_rate.get(instance_id, self.rate * weather)):
                if period:
                    table.answered(instance_id)
            else:
                period = period or now + PERIOD_S
                ejection = table.failed(instance_id, now, all_of_them)
                found += [ejection] if ejection is not None else []
        return found


@settings(derandomize=True)  # in 80 hours of simulated calls there was no ejection
@given(st.integers(0, 2**32), st.integers(2, 8), st.floats(0, 1), st.sampled_from([3, 60, 1000]))
def test_no_rate_of_failure_that_all_share_ejects_an_instance(seed: int, count: int, rate: float, per_s: int) -> None:
    assert Traffic(count, per_s, rate, seed).run(3000) == []


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("per_s", [10, 100])
def test_an_instance_that_fails_gets_few_calls(rate: float, per_s: int) -> None:
    traffic = Traffic(3, per_s, rate, 3, own_rate={2: 1.0})
    found = traffic.run(60 * per_s)
    assert {each.instance_id for each in found} == {2}
    assert found[0].since * per_s < 100, "known after some calls"
    assert traffic.calls[2] < 20 * len(found), "and after as few when it returns"
    assert len(found) <= 9, "which it does more and more rarely"


# --- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failed", "answered", "peers_failed", "peers_answered", "far"),
    [
        pytest.param(4, 0, 0, 1000, False, id="too few failures"),
        pytest.param(5, 0, 0, 0, False, id="no peers"),
        pytest.param(5, 0, 0, 19, False, id="too few answers"),
        pytest.param(5, 0, 0, 20, True, id="in a row"),
        pytest.param(5, 1, 0, 20, False, id="not in a row"),
        pytest.param(5, 0, 2, 59, False, id="peers fail too"),
        pytest.param(5, 0, 2, 60, True, id="peers fail seldom"),
        pytest.param(11, 0, 0, 11, False, id="rates of few calls"),
        pytest.param(12, 0, 0, 12, True, id="rates"),
        pytest.param(400, 1600, 0, 2000, True, id="a gap of a fifth"),
        pytest.param(398, 1602, 0, 2000, False, id="less"),
        pytest.param(900, 100, 900, 100, False, id="all fail alike"),
        pytest.param(100, 900, 900, 100, False, id="the peers are worse"),
    ],
)
def test_the_rule(failed: int, answered: int, peers_failed: int, peers_answered: int, far: bool) -> None:
    assert far_beyond(failed, answered, peers_failed, peers_answered) is far


@given(*[st.integers(0, 10**6)] * 4)
def test_the_rule_needs_enough_failures_and_peers_that_are_better(
    failed: int, answered: int, peers_failed: int, peers_answered: int
) -> None:
    if far_beyond(failed, answered, peers_failed, peers_answered):
        assert failed >= LEAST_FAILURES
        rate, peers_rate = failed / (failed + answered), peers_failed / (peers_failed + peers_answered)
        assert rate - peers_rate >= RATE_GAP
        assert not far_beyond(peers_failed, peers_answered, failed, answered)
        assert far_beyond(failed, answered, 0, peers_failed + peers_answered)
