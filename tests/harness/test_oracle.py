"""The oracle finds each sin, and nothing where there was none."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from harness.oracle import Oracle
from harness.requests import Plan, Shape, Work
from triton_distributed.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    Draining,
    InstanceNotFound,
    NoInstances,
    Overloaded,
    Paused,
    RemoteError,
    StreamIncomplete,
)

STREAM = Plan(Work(1, Shape.STREAM, 4, 20, 0.1))
ERROR = Plan(Work(1, Shape.ERROR, 2))
RESUMED = Plan(Work(1, Shape.CHECKPOINTED, 4))
IDEMPOTENT = Plan(Work(1, Shape.STREAM, 4), idempotent=True)
HURRIED = Plan(Work(1, Shape.STREAM, 4), timeout_s=1.0)
PATIENT = Plan(Work(1, Shape.STREAM, 4), timeout_s=30.0)
DIRECT = Plan(Work(1, Shape.STREAM, 4), idempotent=True, directly=True)
TWO_WAY = Plan(Work(1, Shape.TWO_WAY, 4))
ENDED = "ended"


class Raised(RemoteError, LookupError):
    pass


class Other(RemoteError, TypeError):
    pass


NOT_BEGUN = [
    ConnectionFailed("x", []),
    NoInstances("x", "y"),
    Overloaded("x", 1, "full"),
    Draining("x", 1, "going"),
    Paused("x", 1, "for a while"),
]


def lost(items: int) -> StreamIncomplete:
    return StreamIncomplete("x", 1, "a", "reset", items)


def judged(
    plan: Plan, items: list[Any], end: Any, begun: int | None = None, at_s: float = 0.5, **options: Any
) -> list[str]:
    """What the oracle says of one call: items by number or as they came, then how it ended, after `at_s`."""
    oracle = Oracle(**options)
    ticket = oracle.begin(plan, 10.0)
    for each in items:
        oracle.item(ticket, plan.work.item(each) if isinstance(each, int) else each)
    if isinstance(end, BaseException):
        oracle.failed(ticket, end, 10.0 + at_s)
    elif end == ENDED:
        oracle.answered(ticket, 10.0 + at_s)
    elif end:
        getattr(oracle, end)(ticket, 10.0 + at_s)
    oracle.close(Counter({1: begun}) if begun is not None else Counter({1: 1} if items or end == ENDED else {}))
    return oracle.violations


@pytest.mark.parametrize(
    ("plan", "items", "end", "options"),
    [
        (STREAM, [0, 1, 2, 3], ENDED, {}),
        (STREAM, [0, 1], "left", {}),
        (STREAM, [0], "cancelled", {}),
        (STREAM, [0, 1], lost(2), {}),
        (STREAM, [0, 1], lost(2), {"strict": True}),
        (ERROR, [0, 1], Raised(), {}),
        (HURRIED, [0], DeadlineExceeded("x", 1.0), {"at_s": 1.01}),
        (IDEMPOTENT, [0], lost(1), {"strict": True}),
        (RESUMED, [0], lost(1), {}),
        (RESUMED, [0], lost(1), {"strict": True, "spared": lambda began, ended: False}),
        (RESUMED, [0], Draining("x", 1, "going"), {}),
        (RESUMED, [0], lost(1), {"strict": True, "limited": True}),
        (DIRECT, [], InstanceNotFound("x", 1), {"strict": True}),
        (DIRECT, [], ConnectionFailed("x", []), {"strict": True}),
        (TWO_WAY, [], ConnectionFailed("x", []), {"strict": True}),
        (IDEMPOTENT, [0, 1, 2, 3], ENDED, {"begun": 2}),
        *((STREAM, [], error, {}) for error in NOT_BEGUN),
        *((IDEMPOTENT, [], error, {"begun": 1}) for error in NOT_BEGUN),
    ],
)
def test_what_was_promised_is_no_violation(plan, items, end, options):
    assert judged(plan, items, end, **options) == []


@pytest.mark.parametrize(
    ("plan", "items", "end", "options", "words"),
    [
        (STREAM, [0, 2], lost(2), {}, "item 1 is"),  # one is missing
        (STREAM, [0, 0], lost(2), {}, "item 1 is"),
        (STREAM, [1, 0], lost(2), {}, "item 0 is"),
        (STREAM, [[1, 0, b"other filling......"]], lost(1), {}, "item 0 is"),
        (STREAM, [[2, 0, b""]], lost(1), {}, "item 0 is"),  # of another request
        (STREAM, [0, 1, 2, 3, 4], ENDED, {}, "an item too many"),
        (STREAM, [0, 1, 2], ENDED, {}, "ended cleanly after 3 of 4"),
        (ERROR, [0, 1], ENDED, {}, "though its handler raises"),
        (ERROR, [0], Raised(), {}, "only 1 of 2 items"),
        (ERROR, [0, 1], Other(), {}, "does not raise"),
        (STREAM, [], Raised(), {}, "does not raise"),
        (STREAM, [0, 1], lost(3), {}, "tells of 3 items and 2 came"),
        (STREAM, [], ValueError("?"), {}, "no promise covers"),
        (STREAM, [0], ConnectionFailed("x", []), {}, "1 items had come"),
        (STREAM, [], ConnectionFailed("x", []), {"begun": 1}, "failed as not begun"),
        (STREAM, [0], lost(1), {"begun": 2}, "2 handlers began it"),
        (STREAM, [0], None, {}, "never ended"),
        (HURRIED, [0], DeadlineExceeded("x", 1.0), {"at_s": 0.99}, "its time is not over"),
        (STREAM, [0], DeadlineExceeded("x", 1.0), {}, "its time is not over"),
        (PATIENT, [0], DeadlineExceeded("x", 30.0), {"at_s": 30.0, "longest_s": 15.0}, "long enough"),
        (STREAM, [0, 1, 2, 3], ENDED, {"at_s": 15.5, "longest_s": 15.0}, "took 15.5 s"),
        (IDEMPOTENT, [], lost(0), {"strict": True}, "could have moved"),
        (RESUMED, [0], lost(1), {"strict": True}, "could have moved"),
        (DIRECT, [0], InstanceNotFound("x", 1), {}, "1 items had come"),
        (STREAM, [], InstanceNotFound("x", 1), {}, "no promise covers"),
        *((STREAM, [], error, {"strict": True}, "there was an instance") for error in NOT_BEGUN),
    ],
)
def test_each_sin_is_found(plan, items, end, options, words):
    found = judged(plan, items, end, **options)
    assert any(words in each and "request 1 " in each for each in found), found


def test_an_answer_that_no_handler_began_is_found():
    oracle = Oracle()
    ticket = oracle.begin(STREAM, 0.0)
    oracle.item(ticket, STREAM.work.item(0))
    oracle.left(ticket, 1.0)
    oracle.close(Counter({5: 1}))
    assert "which no caller made" in oracle.violations[0]
    assert "no handler began it" in oracle.violations[1]


def test_a_call_that_ends_twice_is_found():
    oracle = Oracle()
    ticket = oracle.begin(STREAM, 0.0)
    oracle.left(ticket, 1.0)
    oracle.cancelled(ticket, 2.0)
    assert "ended twice: left, then cancelled" in oracle.violations[0]


def test_what_became_of_all_of_them():
    oracle = Oracle()
    for number, ended_s in enumerate((1.0, 4.5, 2.0)):
        plan = Plan(Work(number, Shape.STREAM, 0))
        oracle.answered(oracle.begin(plan, 0.5), ended_s)
    oracle.begin(STREAM, 5.0)
    assert oracle.outcomes() == {"answered": 3, "never ended": 1}
    assert oracle.worst_gap_s() == 2.5
    assert oracle.worst_call_s() == 4.0
