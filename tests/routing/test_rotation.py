"""Which instances are out of rotation."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from triton_distributed.names import EndpointName, Instance
from triton_distributed.routing.rotation import FIRST_PROBE_S, LAST_PROBE_S, Rotation

ENDPOINT = EndpointName("n", "c", "e")


def instances(*ids: int) -> tuple[Instance, ...]:
    return tuple(Instance(ENDPOINT, each, ()) for each in ids)


def rotation() -> Rotation:
    return Rotation(random.Random(3))


def test_all_are_available_until_one_is_not() -> None:
    table, all_three = rotation(), instances(1, 2, 3)
    assert table.available(all_three) is all_three
    table.mark_down(2, 10.0)
    rest = table.available(all_three)
    assert [each.id for each in rest] == [1, 3]
    assert table.available(all_three) is rest
    assert set(table.down) == {2}
    assert table.down[2].since == 10.0
    table.mark_up(2)
    assert table.available(all_three) is all_three
    assert not table.down


def test_when_all_are_down_all_are_tried() -> None:
    table, both = rotation(), instances(1, 2)
    table.mark_down(1, 0.0)
    table.mark_down(2, 0.0)
    assert table.available(both) is both
    others = instances(3, 4)
    assert table.available(others) is others


def test_a_table_that_changed_is_looked_at_again() -> None:
    table = rotation()
    table.mark_down(2, 0.0)
    assert [each.id for each in table.available(instances(1, 2))] == [1]
    assert [each.id for each in table.available(instances(1, 2, 3))] == [1, 3]


def test_probes_back_off_and_begin_anew() -> None:
    table, now = rotation(), 0.0
    assert table.next_probe(1) == float("-inf")
    waits = []
    for _ in range(2000):
        table.mark_down(1, now)
        waits.append(table.next_probe(1) - now)
        now = table.next_probe(1)
    for failed, wait in enumerate(waits[:20]):
        step = min(FIRST_PROBE_S * 2**failed, LAST_PROBE_S)
        assert step / 2 - 1e-6 <= wait <= step + 1e-6
    assert all(LAST_PROBE_S / 2 - 1e-6 <= wait <= LAST_PROBE_S + 1e-6 for wait in waits[20:])
    assert len({round(wait, 6) for wait in waits[20:60]}) > 20, "they are spread"
    table.mark_up(1)
    table.mark_down(1, now)
    assert table.next_probe(1) - now <= FIRST_PROBE_S + 1e-6


def test_many_reports_of_one_loss_count_once() -> None:
    table = rotation()
    for _ in range(1000):
        table.mark_down(1, 5.0)
    assert table.down[1].failures == 1
    assert table.next_probe(1) <= 5.0 + FIRST_PROBE_S


def test_forget_drops_what_discovery_no_longer_lists() -> None:
    table = rotation()
    for each in (1, 2, 3):
        table.mark_down(each, 0.0)
    some = instances(1, 2, 4)
    assert [each.id for each in table.available(some)] == [4]
    table.forget({2})
    assert set(table.down) == {2}
    assert [each.id for each in table.available(some)] == [1, 4]
    table.forget(())
    assert table.available(some) is some


class Machine(RuleBasedStateMachine):
    """Against a plain set of the ids that are down."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.model, self.now = rotation(), set[int](), 0.0
        self.offered = instances(1, 2, 3, 4)

    @rule(instance_id=st.integers(1, 5), passed=st.floats(0, 10))
    def down(self, instance_id: int, passed: float) -> None:
        self.now += passed
        self.table.mark_down(instance_id, self.now)
        self.model.add(instance_id)
        assert self.now <= self.table.next_probe(instance_id) <= self.now + LAST_PROBE_S

    @rule(instance_id=st.integers(1, 5))
    def up(self, instance_id: int) -> None:
        self.table.mark_up(instance_id)
        self.model.discard(instance_id)

    @rule(known=st.sets(st.integers(1, 5)))
    def forget(self, known: set[int]) -> None:
        self.table.forget(known)
        self.model &= known

    @rule(ids=st.sets(st.integers(1, 5), min_size=1))
    def change(self, ids: set[int]) -> None:
        self.offered = instances(*sorted(ids))

    @invariant()
    def agrees(self) -> None:
        up = tuple(each for each in self.offered if each.id not in self.model)
        available = self.table.available(self.offered)
        assert available == (up or self.offered)
        assert self.table.available(self.offered) is available
        assert set(self.table.down) == self.model


TestMachine = Machine.TestCase


@given(st.integers(0, 2**32), st.floats(0, 1e9))
def test_next_probe_is_never_in_the_past(seed: int, now: float) -> None:
    table = Rotation(random.Random(seed))
    table.mark_down(1, now)
    assert table.next_probe(1) > now
