"""The table of a call's life: what it names is closed, and every way through it ends where the reader knows the end."""

from __future__ import annotations

import pytest

from triton_distributed.calling.state import (
    AFTER,
    CLOSED,
    END,
    FAILED,
    LAST,
    LEAVE,
    NEW,
    OPEN,
    OVER,
    PLACE,
    PLACING,
    RAISE,
    READ,
    SENT,
    UNREAD,
    WHOLE,
    Input,
    State,
)


def reached(start: int) -> set[int]:
    """The states that can follow, `start` included."""
    found, left = {start}, [start]
    while left:
        new = set(AFTER[left.pop()].values()) - found
        found |= new
        left += new
    return found


def test_each_state_has_a_row_and_each_row_leads_to_states():
    assert len(AFTER) == len(State)
    for row in AFTER:
        assert set(row) <= set(Input)
        assert set(row.values()) <= set(State)


def test_every_state_can_be_reached():
    assert reached(NEW) == set(State)


@pytest.mark.parametrize("state", [UNREAD, OVER, READ, FAILED, CLOSED])
def test_a_call_that_is_over_on_the_wire_stays_so(state: int):
    assert min(reached(state)) >= UNREAD


@pytest.mark.parametrize("state", [NEW, PLACING, OPEN])
def test_a_call_under_way_ends_by_draining_only(state: int):
    after = {event: then for event, then in AFTER[state].items() if then > OPEN}
    assert after == {END: UNREAD}


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([SENT, END, WHOLE], READ),  # most calls
        ([PLACE, SENT, END, LAST], OVER),  # dialled first, read with `anext`
        ([SENT, PLACE, SENT, END, WHOLE], READ),  # retried at once
        ([SENT, PLACE, PLACE, SENT, END, RAISE], FAILED),  # retried from a task
        ([SENT, END, LEAVE], CLOSED),
        ([PLACE, END, LEAVE, RAISE], CLOSED),  # cancelled here: the reader gets CancelledError, then StreamClosed
        ([SENT, END, RAISE, LAST], FAILED),
        ([SENT, END, LAST, WHOLE], READ),  # an `async for` over what was read already
    ],
)
def test_a_life(events: list[int], state: int):
    at = NEW
    for event in events:
        at = AFTER[at][event]
    assert at == state


def test_what_cannot_happen_is_an_error():
    for state, event in [(NEW, RAISE), (OPEN, SENT), (UNREAD, PLACE), (CLOSED, LEAVE), (READ, RAISE)]:
        with pytest.raises(KeyError):
            AFTER[state][event]
