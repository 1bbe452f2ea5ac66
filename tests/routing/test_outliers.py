"""Who fails or is slow far beyond its peers, and who only has bad luck."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from triton_distributed.names import EndpointName, Instance
from triton_distributed.routing.evidence import MEMORY, Evidence, Times, deviations, likelihood_gain
from triton_distributed.routing.outliers import GROWTH, LEAST_EVENTS, LEAST_TIMED_LOOKS, SLOW_LOOKS, Ejection, Outliers

ENDPOINT = EndpointName("n", "c", "e")
FIRST_S = 5.0
QUICK_LOOKS = 16  # as the runtime has them


def instances(*ids: int) -> tuple[Instance, ...]:
    return tuple(Instance(ENDPOINT, each, ()) for each in ids)


def outliers(seed: int = 3) -> Outliers:
    return Outliers(random.Random(seed), FIRST_S)


def fail(table: Outliers, instance_id: int, count: int, answered: dict[int, int]) -> None:
    """So many failures of one, and answers of others."""
    for _ in range(count):
        table.failed(instance_id)
    for each, number in answered.items():
        table.answered[each] += number


# --- failures --------------------------------------------------------------------------------------------------------


def test_an_instance_that_always_fails_is_ejected_and_the_reason_has_the_numbers() -> None:
    table, three = outliers(), instances(1, 2, 3)
    fail(table, 2, 10, {1: 10, 3: 10})
    ejection = table.look_at(2, 100.0, three)
    assert ejection is not None
    assert (ejection.instance_id, ejection.since, ejection.times) == (2, 100.0, 1)
    assert ejection.reason == "10 of its last 10 calls failed, of its peers' 0 of 20"
    assert 100.0 + FIRST_S / 2 <= ejection.until <= 100.0 + FIRST_S
    assert [each.id for each in table.available(three)] == [1, 3]
    assert set(table.ejected) == {2}
    assert table.next_return() == ejection.until


def test_it_is_to_be_looked_at_after_five_failures_and_then_after_twice_as_many() -> None:
    table = outliers()
    asked = []
    for number in range(1, 40):
        if table.failed(1):
            asked.append(number)
            assert table.look_at(1, 0.0, instances(1, 2)) is None  # nobody knows anything of the other
    assert asked == [LEAST_EVENTS, 3 * LEAST_EVENTS, 7 * LEAST_EVENTS]


def test_a_look_at_all_finds_it_too() -> None:
    table, three = outliers(), instances(1, 2, 3)
    fail(table, 1, 20, {2: 20, 3: 20})
    ejection = table.look(0.0, three)
    assert ejection is not None
    assert ejection.instance_id == 1


def test_where_all_fail_alike_nobody_is_ejected() -> None:
    table, three = outliers(), instances(1, 2, 3)
    for now in range(50):
        for each in (1, 2, 3):
            fail(table, each, 20, {each: 1})
        assert all(table.look_at(each, now, three) is None for each in (1, 2, 3))
        assert table.look(now, three) is None


def test_without_peers_to_compare_to_nobody_is_ejected() -> None:
    table = outliers()
    fail(table, 1, 1000, {})
    assert table.look(0.0, instances(1)) is None
    assert table.look(1.0, instances(1, 2)) is None
    fail(table, 1, 1000, {2: 5})  # too few to say anything
    assert table.look(2.0, instances(1, 2)) is None


def test_many_streams_of_one_lost_connection_are_one_event() -> None:
    table, three = outliers(), instances(1, 2, 3)
    assert not any(table.failed(1, cause=77) for _ in range(1000))
    table.answered.update({2: 100, 3: 100})
    assert table.look(0.0, three) is None
    for cause in range(LEAST_EVENTS):
        table.failed(1, cause)
    ejection = table.look(0.1, three)
    assert ejection is not None
    assert ejection.instance_id == 1


def test_a_good_name_does_not_protect_for_long() -> None:
    table, three = outliers(), instances(1, 2, 3)
    table.answered.update({1: 100_000, 2: 100_000, 3: 100_000})
    assert table.look(0.0, three) is None
    failures = 0
    while not table.ejected:
        failures += 1
        table.answered[2] += 1
        table.answered[3] += 1
        if table.failed(1):
            table.look_at(1, 0.5, three)
        assert failures < 2 * MEMORY
    assert set(table.ejected) == {1}


def test_calls_of_long_ago_are_forgotten() -> None:
    table, three = outliers(), instances(1, 2, 3)
    fail(table, 1, 4, {2: 100, 3: 100})
    assert table.look(0.0, three) is None
    table.look(1000.0, three)
    fail(table, 1, 4, {2: 100, 3: 100})
    assert table.look(1001.0, three) is None


def test_failures_of_an_instance_that_is_out_do_not_count() -> None:
    table, three = outliers(), instances(1, 2, 3)
    fail(table, 1, 10, {2: 10, 3: 10})
    first = table.look_at(1, 0.0, three)
    assert first is not None
    assert not any(table.failed(1) for _ in range(100))  # `direct`, or calls from before
    table.answered[1] += 3
    assert table.look(1.0, three) is None
    assert table.readmit(first.until - 0.01) == []
    assert table.readmit(first.until) == [1]
    assert table.available(three) is three
    assert not table.failed(1, began=first.until - 1)
    table.answered.update({2: 100, 3: 100})
    fail(table, 1, 4, {})
    assert table.look(first.until + 1, three) is None, "what was before is not counted"


def test_it_is_calm_again_when_no_failure_counts_any_more() -> None:
    table, three = outliers(), instances(1, 2, 3)
    assert table.calm()
    fail(table, 1, 2, {1: 50, 2: 50, 3: 50})
    table.look(0.0, three)
    assert not table.calm()
    for now in range(1, 200):
        table.look(now, three)
    assert table.calm()
    fail(table, 1, 9, {})
    assert table.look(200.0, three) is None, "what was answered before is forgotten with it"
    table.answered.update({2: 20, 3: 20})
    assert table.look(201.0, three) is not None


# --- times -----------------------------------------------------------------------------------------------------------


def slow_looks(table: Outliers, three: tuple[Instance, ...], seconds: dict[int, float], count: int) -> list[Ejection]:
    found = []
    for now in range(count):
        for each, time in seconds.items():
            for step in range(8):
                table.timed(each, time * (0.9 + 0.02 * step))
        ejection = table.look(float(now), three)
        found += [ejection] if ejection is not None else []
    return found


def test_an_instance_that_is_slow_far_beyond_its_peers_is_ejected() -> None:
    table, three = outliers(), instances(1, 2, 3)
    ejected = slow_looks(table, three, {1: 0.1, 2: 0.1, 3: 2.0}, 20)
    assert [each.instance_id for each in ejected] == [3]
    assert ejected[0].since == LEAST_TIMED_LOOKS - 1, "at the tenth look"
    assert "its first answers take 1.9" in ejected[0].reason


def test_one_that_turns_slow_later_is_ejected_after_some_looks_in_a_row() -> None:
    table, three = outliers(), instances(1, 2, 3)
    assert slow_looks(table, three, {1: 0.1, 2: 0.1, 3: 0.1}, 20) == []
    ejected = slow_looks(table, three, {1: 0.1, 2: 0.1, 3: 20.0}, 20)
    assert [each.instance_id for each in ejected] == [3]
    assert SLOW_LOOKS <= ejected[0].since <= 10


def test_pauses_of_some_seconds_are_not_slowness() -> None:
    table, three = outliers(), instances(1, 2, 3)
    slow_looks(table, three, {1: 0.1, 2: 0.1, 3: 5.0}, SLOW_LOOKS)
    assert slow_looks(table, three, {1: 0.1, 2: 0.1, 3: 0.1}, 100) == []


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param({1: 0.1, 2: 0.1, 3: 0.4}, id="four times as slow"),
        pytest.param({1: 0.001, 2: 0.001, 3: 0.09}, id="nobody feels it"),
        pytest.param({1: 2.0, 2: 2.0, 3: 2.0}, id="all"),
        pytest.param({1: 0.1, 2: 2.0, 3: 2.0}, id="most of them"),
        pytest.param({3: 100.0}, id="no peers"),
    ],
)
def test_slowness_that_ejects_nobody(seconds: dict[int, float]) -> None:
    assert slow_looks(outliers(), instances(1, 2, 3), seconds, 100) == []


def test_calls_that_never_answer_are_slow_ones() -> None:
    table, three = outliers(), instances(1, 2, 3)
    waiting: list[tuple[int, float]] = []
    for now in range(30):
        for each in (1, 2):
            for _ in range(8):
                table.timed(each, 0.05)
        waiting = [(3, age + 1.0) for _, age in waiting] + [(3, 0.0)] * 2
        ejection = table.look(float(now), three, waiting)
        if ejection is not None:
            break
    assert ejection is not None
    assert ejection.instance_id == 3
    assert set(table.ejected) == {3}


def test_calls_that_were_left_count_where_others_answer_sooner() -> None:
    table, three = outliers(), instances(1, 2, 3)
    for now in range(30):
        for each in (1, 2):
            for _ in range(8):
                table.timed(each, 0.05)
                table.left(each, 0.01)  # says nothing
        for _ in range(8):
            table.left(3, 5.0)
        ejection = table.look(float(now), three)
        if ejection is not None:
            break
    assert ejection is not None
    assert ejection.instance_id == 3


# --- how long, and how many ----------------------------------------------------------------------------------------------


def eject(table: Outliers, now: float, three: tuple[Instance, ...]) -> Ejection:
    fail(table, 1, 20, {2: 20, 3: 20})
    ejection = table.look_at(1, now, three)
    assert ejection is not None
    return ejection


def test_the_time_grows_and_shrinks_again_with_good_behaviour() -> None:
    table, three, now = outliers(), instances(1, 2, 3), 0.0
    for number in range(12):
        ejection = eject(table, now, three)
        step = FIRST_S * min(2.0**number, GROWTH)
        assert step / 2 <= ejection.until - ejection.since <= step
        assert ejection.times == min(number, 6) + 1
        now = ejection.until
        assert table.readmit(now) == [1]
    now += FIRST_S * 32  # as long as the last doubling was
    assert eject(table, now, three).times == 7
    now = table.ejected[1].until
    table.readmit(now)
    now += FIRST_S * (32 + 60)
    assert eject(table, now, three).times == 6
    now = table.ejected[1].until
    table.readmit(now)
    assert eject(table, now + 10_000, three).times == 1


@pytest.mark.parametrize(("count", "most"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (10, 5)])
def test_at_most_half_are_ejected(count: int, most: int) -> None:
    table, all_of_them = outliers(), instances(*range(1, count + 1))
    for now in range(40):  # the first one is good, all others fail
        for each in range(2, count + 1):
            fail(table, each, 50, {1: 50})
        table.look(now * 0.01, all_of_them)
    assert len(table.ejected) == most
    assert len(table.available(all_of_them)) == count - most


def test_where_others_leave_some_of_the_ejected_are_called_again() -> None:
    table, four = outliers(), instances(1, 2, 3, 4)
    for instance_id, now in ((1, 0.0), (2, 1.0)):
        fail(table, instance_id, 30, {3: 30, 4: 30})
        assert table.look_at(instance_id, now, four) is not None
    assert [each.id for each in table.available(four)] == [3, 4]
    assert [each.id for each in table.available(instances(1, 2, 3))] == [1, 3], "the one that returns first"
    assert [each.id for each in table.available(instances(1, 2))] == [1]
    assert [each.id for each in table.available(instances(2))] == [2]
    table.forget({2, 3, 4})
    assert set(table.ejected) == {2}


class Machine(RuleBasedStateMachine):
    """Whatever happens, at most half are left out, and never the last."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.now = outliers(), 0.0
        self.known = instances(1, 2, 3, 4, 5)

    @rule(instance_id=st.integers(1, 6), count=st.integers(1, 200), cause=st.none() | st.integers(0, 3))
    def failures(self, instance_id: int, count: int, cause: int | None) -> None:
        for _ in range(count):
            if self.table.failed(instance_id, cause):
                self.table.look_at(instance_id, self.now, self.known)

    @rule(instance_id=st.integers(1, 6), count=st.integers(1, 10_000))
    def answers(self, instance_id: int, count: int) -> None:
        self.table.answered[instance_id] += count

    @rule(instance_id=st.integers(1, 6), seconds=st.floats(0, 1e4), count=st.integers(1, 50))
    def times(self, instance_id: int, seconds: float, count: int) -> None:
        for _ in range(count):
            self.table.timed(instance_id, seconds)
        self.table.left(instance_id, seconds)

    @rule(passed=st.floats(0, 100), waiting=st.lists(st.tuples(st.integers(1, 6), st.floats(0, 1e4)), max_size=30))
    def looks(self, passed: float, waiting: list[tuple[int, float]]) -> None:
        self.now += passed
        self.table.look(self.now, self.known, waiting)

    @rule(passed=st.floats(0, 1000))
    def returns(self, passed: float) -> None:
        self.now += passed
        for instance_id in self.table.readmit(self.now):
            assert instance_id not in self.table.ejected
        due = self.table.next_return()
        assert due is None or due > self.now

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


def even(rng: random.Random) -> float:
    return rng.lognormvariate(-4, 0.3)


def heavy_tail(rng: random.Random) -> float:
    return rng.lognormvariate(-3, 1.5)


def prompts(rng: random.Random) -> float:
    """Ten tokens or ten thousand."""
    return rng.choice((0.05, 10.0)) * rng.lognormvariate(0, 0.5)


Time = Callable[[random.Random], float]


@dataclass
class Traffic:
    """Calls to some instances, as the runtime tells of them."""

    count: int
    per_s: float
    rate: float
    time: Time
    seed: int = 1
    spread: str = "turns"
    own_rate: dict[int, float] = field(default_factory=dict)
    own_time: dict[int, Time] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=dict)

    def run(self, seconds: float) -> list[Ejection]:
        rng, table, all_of_them = random.Random(self.seed), outliers(self.seed), instances(*range(1, self.count + 1))
        found, now, due, times, looks, weather, pauses = [], 0.0, 1.0, 0, QUICK_LOOKS, 1.0, dict[int, float]()
        for number in range(int(seconds * self.per_s)):
            now += 1 / self.per_s
            if now >= due:
                found.append(table.look(now, all_of_them))
                table.readmit(now)
                due, times, looks = due + 1, 8 * self.count, QUICK_LOOKS
                # Bad requests come in swarms, and each instance collects its garbage now and then.
                weather = rng.choice((1, 1, 1, 4, 0.2)) if rng.random() < 0.05 else weather
                pauses = {each: 0.5 for each in range(1, self.count + 1) if rng.random() < 0.05}
            available = table.available(all_of_them)
            chosen = available[number % len(available)] if self.spread == "turns" else rng.choice(available)
            instance_id = chosen.id
            self.calls[instance_id] = self.calls.get(instance_id, 0) + 1
            if times:
                times -= 1
                time = self.own_time.get(instance_id, self.time)(rng)
                table.timed(instance_id, time + pauses.get(instance_id, 0.0))
            if rng.random() >= min(0.95, self.own_rate.get(instance_id, self.rate * weather)):
                table.answered[instance_id] += 1
            elif table.failed(instance_id) and looks:
                looks -= 1
                found.append(table.look_at(instance_id, now, all_of_them))
        return [each for each in found if each is not None]


@pytest.mark.parametrize("time", [even, heavy_tail, prompts])
@pytest.mark.parametrize("rate", [0.0, 0.02, 0.2, 0.5, 0.9])
def test_equal_instances_are_not_ejected(rate: float, time: Time) -> None:
    found = []
    for count in (2, 3, 8):
        for per_s, seconds in ((3, 1200), (60, 120), (1000, 8)):
            for spread in ("turns", "chance"):
                traffic = Traffic(count, per_s, rate, time, seed=count, spread=spread)
                found += traffic.run(seconds)
    assert not found, "in two and a half hours of 18 clients"


@settings(max_examples=25, deadline=None, derandomize=True)  # of 20,000 such runs one ejects, by bad luck
@given(st.integers(0, 2**32), st.integers(2, 6), st.floats(0, 1))
def test_no_rate_of_failure_that_all_have_ejects_anybody(seed: int, count: int, rate: float) -> None:
    assert Traffic(count, 50, rate, even, seed=seed, spread="chance").run(60) == []


@pytest.mark.parametrize("per_s", [10, 100, 2000])
@pytest.mark.parametrize("time", [even, prompts])
def test_an_instance_that_fails_gets_few_calls(time: Time, per_s: float) -> None:
    traffic = Traffic(3, per_s, 0.02, time, own_rate={2: 1.0})
    found = traffic.run(60)
    assert {each.instance_id for each in found} == {2}
    assert found[0].since * per_s < 100, "known after some calls"
    assert traffic.calls[2] < 20 * len(found), "and after fewer each time that it comes back"
    assert len(found) <= 6, "which it does less and less"


@pytest.mark.parametrize("per_s", [20, 2000])
@pytest.mark.parametrize("time", [heavy_tail, prompts])
def test_an_instance_that_is_ten_times_as_slow_is_found(time: Time, per_s: float) -> None:
    def slower(rng: random.Random) -> float:
        return 10 * time(rng)

    found = Traffic(3, per_s, 0.02, time, own_time={2: slower}).run(60)
    assert {each.instance_id for each in found} == {2}


# --- the statistics --------------------------------------------------------------------------------------------------


def test_likelihood_gain() -> None:
    assert likelihood_gain(0, 10, 0, 10) == 0
    assert likelihood_gain(10, 0, 10, 0) == 0
    assert likelihood_gain(5, 5, 50, 50) == pytest.approx(0)
    assert likelihood_gain(10, 0, 0, 10) == pytest.approx(20 * 0.6931, rel=1e-3)  # 20 coins that fell so
    assert likelihood_gain(10, 0, 0, 1000) > likelihood_gain(10, 0, 0, 10)


@given(*[st.floats(0, 1e6)] * 4)
def test_likelihood_gain_is_never_negative(failed: float, answered: float, theirs: float, well: float) -> None:
    if failed + answered and theirs + well:
        assert likelihood_gain(failed, answered, theirs, well) >= -1e-6 * (failed + answered + theirs + well)


def test_deviations() -> None:
    same, slow = Times(20, 20 * 1.0, 20 * 1.0), Times(20, 20 * 3.0, 20 * 9.0)
    assert deviations(same, same) == 0
    assert deviations(slow, same) == float("inf")
    assert deviations(same, slow) == 0
    spread = Times(100, 100 * 2.0, 100 * (4.0 + 1.0))
    assert deviations(spread, Times(100, 0.0, 100 * 1.0)) == pytest.approx(2 / 0.02**0.5)


def test_evidence_fades() -> None:
    evidence = Evidence(5)
    for number in range(1000):
        evidence.note_failure(number % 2)
        evidence.note_time(1.0)
    evidence.answered = 1000
    evidence.fade(1.0)
    assert evidence.calls == pytest.approx(MEMORY)
    assert evidence.failed == evidence.answered == pytest.approx(MEMORY / 2)
    assert evidence.timed == pytest.approx(MEMORY)
    evidence.fade(0.5)
    assert evidence.calls == pytest.approx(MEMORY / 2)
    assert evidence.timed == pytest.approx(MEMORY / 2)
