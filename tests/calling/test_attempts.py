"""Who is tried next, and what the caller gets when no instance is left."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_distributed.calling.attempts import Attempts
from triton_distributed.errors import ConnectionFailed, Draining, Overloaded, Paused
from triton_distributed.names import EndpointName, Instance

NAME = EndpointName("n", "c", "e")
ONE, TWO, THREE = (Instance(NAME, number, (f"unix:/{number}",)) for number in (1, 2, 3))
ALL = (ONE, TWO, THREE)


def after(*tried: Instance, redial: bool = False) -> Attempts:
    made = Attempts()
    for each in tried:
        made.record(each.id, [(each.addresses[0], "refused")], redial=redial)
    return made


def test_a_first_attempt_is_offered_the_rotation_itself():
    assert Attempts().next(ALL, ALL, False) is ALL  # policies compare the tuple by identity


def test_those_that_were_tried_are_not_offered():
    assert after(ONE).next(ALL, ALL, False) == (TWO, THREE)


def test_those_out_of_rotation_follow_those_in_it():
    assert after(ONE).next((ONE, TWO), ALL, False) == (TWO,)
    assert after(ONE, TWO).next((ONE, TWO), ALL, False) == (THREE,)


def test_none_is_left():
    assert after(*ALL).next(ALL, ALL, False) == ()


def test_a_lost_connection_is_dialled_once_more_where_no_other_instance_is_left():
    attempts = after(ONE, redial=True)
    assert attempts.next(ALL, ALL, False) == (TWO, THREE)
    assert attempts.next((ONE,), (ONE,), False) == (ONE,)
    attempts.chosen(ONE.id)
    attempts.record(ONE.id, [], redial=True)
    assert attempts.next((ONE,), (ONE,), False) == ()


@pytest.mark.parametrize("redial", [False, True])
def test_a_direct_call_tries_no_other(redial: bool):
    assert after(ONE, redial=redial).next(ALL, ALL, True) == ((ONE,) if redial else ())


def test_without_a_refusal_the_error_names_each_address():
    error = after(ONE, TWO).error('endpoint "n/c/e"')
    assert isinstance(error, ConnectionFailed)
    assert error.attempts == (("unix:/1", "refused"), ("unix:/2", "refused"))


def test_a_worker_at_capacity_outlives_those_that_shut_down():
    for other in (Draining("n/c/e", 2, "it drains", 2), Paused("n/c/e", 2, "it is paused", 2)):
        attempts = Attempts()
        attempts.record(1, [], Overloaded("n/c/e", 1, "it is full", 1, 0.5))
        attempts.record(2, [], other)
        error = attempts.error("e")
        assert isinstance(error, Overloaded)
        assert (error.instance_id, error.attempts, error.retry_after_s) == (1, 2, 0.5)


@given(st.lists(st.tuples(st.sampled_from(ALL), st.booleans()), max_size=8), st.sets(st.sampled_from(ALL)))
def test_no_instance_is_offered_a_third_time(given_to: list[tuple[Instance, bool]], rotation: set[Instance]):
    attempts, chosen = Attempts(), {each.id: 0 for each in ALL}
    in_rotation = tuple(sorted(rotation, key=lambda each: each.id))
    for _, redial in given_to:
        offered = attempts.next(in_rotation, ALL, False) or attempts.next(ALL, ALL, False)
        if not offered:
            break
        instance = offered[0]
        attempts.chosen(instance.id)
        chosen[instance.id] += 1
        attempts.record(instance.id, [], redial=redial)
    assert max(chosen.values()) <= 2
