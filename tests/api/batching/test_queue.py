"""The queue of waiting requests: order, sizes, times; nothing is lost and nothing is in two batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_distributed.api.batching import QueuePolicy
from triton_distributed.api.batching.queue import BatchQueue


@dataclass(eq=False)
class Request:
    arrived: float
    priority: int = 0
    number: int = 0
    expires: float = field(default=inf)


def filled(
    count: int, *, at: float = 0.0, max_size: int = 4, max_wait_s: float = 10.0, **options
) -> BatchQueue[Request]:
    queue: BatchQueue[Request] = BatchQueue(max_size, max_wait_s, **options)
    for number in range(count):
        assert queue.add(Request(at, number=number))
    return queue


def numbers(requests: list[Request]) -> list[int]:
    return [each.number for each in requests]


def test_a_full_batch_is_due_at_once_and_the_rest_after_the_delay():
    queue = filled(6)
    assert queue.due() == -inf
    assert numbers(queue.take(0.0)) == [0, 1, 2, 3]
    assert queue.due() == 10.0
    assert queue.take(9.9) == []
    assert numbers(queue.take(10.0)) == [4, 5]
    assert queue.due() == inf
    assert queue.take(99.0) == []


@pytest.mark.parametrize(("waiting", "taken"), [(1, 0), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5), (8, 8), (9, 8)])
def test_a_batch_has_the_largest_preferred_size_that_is_possible(waiting, taken):
    queue = filled(waiting, max_size=8, preferred_sizes=(5, 2))
    assert len(queue.take(0.0)) == taken


def test_after_the_delay_a_batch_has_all_requests():
    assert len(filled(7, max_size=8, preferred_sizes=(2, 5)).take(10.0)) == 7


def test_larger_priorities_go_first_and_equal_ones_in_order():
    queue: BatchQueue[Request] = BatchQueue(8, 1.0)
    for number, priority in enumerate([0, 5, -3, 5, 0, 7]):
        queue.add(Request(0.0, priority, number))
    assert numbers(queue.take(1.0)) == [5, 1, 3, 0, 4, 2]


def test_a_request_of_low_priority_that_has_waited_makes_the_batch_due():
    queue: BatchQueue[Request] = BatchQueue(8, 1.0)
    queue.add(Request(0.0, -1, 1))
    queue.add(Request(0.9, 1, 2))
    assert queue.due() == 1.0
    assert numbers(queue.take(1.0)) == [2, 1]


def test_requests_that_have_left_are_replaced_by_the_next():
    queue = filled(6)
    taken = queue.take(0.0, lambda request: request.number not in (1, 3))
    assert numbers(taken) == [0, 2, 4, 5]
    assert len(queue) == 0


def test_a_full_queue_takes_no_more_and_only_of_that_priority():
    queue: BatchQueue[Request] = BatchQueue(8, 1.0, policies={1: QueuePolicy(max_waiting=2)})
    assert [queue.add(Request(0.0, 1)) for _ in range(3)] == [True, True, False]
    assert queue.add(Request(0.0, 0))
    assert len(queue) == 3
    assert len(queue.take(1.0)) == 3
    assert queue.add(Request(0.0, 1))


def test_a_policy_of_timeouts_rejects():
    queue = filled(2, policy=QueuePolicy(timeout_s=3.0))
    queue.add(late := Request(2.0, number=2))
    assert queue.expiry == 3.0
    assert queue.expire(2.9) == []
    assert numbers(queue.expire(3.0)) == [0, 1]
    assert len(queue) == 1
    assert queue.expiry == 5.0
    assert queue.expire(5.0) == [late]
    assert queue.expiry == inf


def test_a_policy_of_delays_lets_a_late_request_go_last_of_its_priority():
    queue: BatchQueue[Request] = BatchQueue(8, 100.0, policy=QueuePolicy(timeout_s=3.0, on_timeout="delay"))
    queue.add(Request(0.0, 0, 0))
    assert queue.expire(3.0) == []
    for number, priority in enumerate([0, -1, 1], 1):
        queue.add(Request(3.0, priority, number))
    assert queue.due() == -inf  # A late request has waited long enough.
    assert numbers(queue.take(3.0)) == [3, 1, 0, 2]


def test_a_request_whose_time_is_over_makes_a_batch_due():
    queue = filled(1, max_wait_s=10.0, policy=QueuePolicy(timeout_s=3.0))
    queue.add(Request(1.0, number=1))
    assert queue.due() == 3.0
    assert queue.take(2.9) == []
    assert numbers(queue.take(3.0)) == [0, 1]
    queue.add(leaver := Request(5.0))
    queue.add(Request(6.0))
    assert queue.remove(leaver)
    assert queue.take(8.0) == []
    assert queue.expire(8.0) == []
    assert queue.due() == 9.0


@pytest.mark.parametrize(
    ("allowed", "limit_s", "own_s", "expires"),
    [
        (True, 3.0, 1.0, 1.0),
        (True, 3.0, 5.0, 3.0),  # A request cannot extend the limit.
        (True, None, 5.0, 5.0),
        (True, 3.0, None, 3.0),
        (False, 3.0, 1.0, 3.0),
    ],
)
def test_a_request_may_shorten_its_time_where_the_policy_allows_it(allowed, limit_s, own_s, expires):
    queue: BatchQueue[Request] = BatchQueue(8, 1.0, policy=QueuePolicy(timeout_s=limit_s, allow_override=allowed))
    queue.add(request := Request(0.0), own_s)
    assert request.expires == queue.expiry == expires


POLICIES = st.builds(
    QueuePolicy,
    max_waiting=st.none() | st.integers(1, 4),
    timeout_s=st.none() | st.sampled_from([1.0, 2.5, 6.0]),
    on_timeout=st.sampled_from(["reject", "delay"]),
    allow_override=st.booleans(),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(-1, 1), st.none() | st.sampled_from([0.5, 2.0])),
        st.tuples(st.just("leave"), st.integers(0, 30), st.none()),
        st.tuples(st.just("wait"), st.sampled_from([0.0, 0.5, 1.0, 3.0]), st.none()),
        st.tuples(st.just("take"), st.just(0), st.none()),
    ),
    max_size=60,
)


@given(
    steps=STEPS,
    max_size=st.integers(1, 5),
    preferred=st.sets(st.integers(1, 5), max_size=2),
    max_wait_s=st.sampled_from([0.0, 1.0, 2.0]),
    policy=POLICIES,
    policies=st.dictionaries(st.integers(-1, 1), POLICIES, max_size=2),
)
def test_each_request_ends_once_and_in_order(steps, max_size, preferred, max_wait_s, policy, policies):
    sizes = {*(each for each in preferred if each <= max_size), max_size}
    queue: BatchQueue[Request] = BatchQueue(max_size, max_wait_s, sorted(sizes - {max_size}), policy, policies)
    now, waiting, late, ended = 0.0, dict[int, Request](), set[int](), Counted()
    for number, (step, value, own_s) in enumerate(steps):
        of_priority = [each for each in waiting.values() if each.priority == value]
        if step == "add":
            request = Request(now, value, number)
            limit = policies.get(value, policy).max_waiting
            assert queue.add(request, own_s) is (limit is None or len(of_priority) < limit)
            if limit is None or len(of_priority) < limit:
                waiting[number] = request
        elif step == "leave":
            chosen = next((each for each in waiting.values() if each.number >= value), None)
            if chosen is not None:
                assert queue.remove(chosen)
                assert not queue.remove(chosen)
                ended.add(waiting, [chosen])
        elif step == "wait":
            now += value
        rejected = queue.expire(now)
        over = {each.number for each in waiting.values() if each.expires <= now}
        delayed = {each for each in over if queue.policy(waiting[each].priority).on_timeout == "delay"}
        late |= delayed
        assert {each.number for each in rejected} == over - delayed
        ended.add(waiting, rejected)
        assert queue.expiry <= min((each.expires for each in waiting.values() if each.number not in late), default=inf)
        if step == "take":
            oldest = min((-inf if each.number in late else each.arrived for each in waiting.values()), default=inf)
            fitting = max((each for each in sizes if each <= len(waiting)), default=0)
            expected = min(len(waiting), max_size) if oldest + max_wait_s <= now else fitting
            assert (queue.due() <= now) is (expected > 0)
            batch = queue.take(now)
            ordered = sorted(waiting.values(), key=lambda each: (-each.priority, each.number in late))
            kinds = [(each.priority, each.number in late) for each in batch]
            assert kinds == [(each.priority, each.number in late) for each in ordered[:expected]]
            for kind in set(kinds):  # Late requests go in the order in which they became late.
                if not kind[1]:
                    mine = [each.number for each in batch if (each.priority, each.number in late) == kind]
                    assert (
                        mine
                        == [each.number for each in ordered if each.priority == kind[0] and each.number not in late][
                            : len(mine)
                        ]
                    )
            ended.add(waiting, batch)
        assert len(queue) == len(waiting)
    while waiting:
        batch = queue.take(inf)
        assert batch
        ended.add(waiting, batch)
    assert len(queue) == 0
    assert queue.due() == inf


class Counted:
    """The requests that have ended, each of them once."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def add(self, waiting: dict[int, Request], requests: list[Request]) -> None:
        for each in requests:
            assert each.number not in self._seen
            self._seen.add(each.number)
            del waiting[each.number]
