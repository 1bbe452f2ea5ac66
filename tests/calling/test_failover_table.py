"""Every combination of what a call knows after a failed attempt, against rules that are stated another way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product

import pytest

from triton_distributed.calling.failover import (
    NO_BUDGET,
    READ_FIRST,
    STAY,
    STOPPED,
    TOO_OFTEN,
    Delivered,
    Ending,
    Error,
    Fail,
    Remaining,
    Resume,
    Retry,
    Terms,
    Verdict,
    decide,
)

Combination = tuple[Ending, Terms, Delivered, Remaining]

ON_THE_WIRE = set(Ending) - {Ending.UNREACHED, Ending.UNSENT, Ending.STALLED}
NO_HANDLER = {Ending.UNREACHED, Ending.UNSENT, Ending.STALLED, Ending.CUT_OFF, Ending.REFUSED, Ending.OVERLOADED}
ALIVE = {Ending.STALLED, Ending.SILENT}  # The worker may wake, and the attempt may still succeed.
FINAL = {Ending.FAILED, Ending.CANCELLED}


def every() -> Iterator[tuple[Combination, Verdict]]:
    """All combinations, each with its verdict."""
    no_yes = (False, True)
    terms = [Terms(*each) for each in product(no_yes, repeat=len(Terms._fields))]
    delivered = [Delivered(*each) for each in product(no_yes, repeat=len(Delivered._fields))]
    means = [Remaining(*each) for each in product(no_yes, repeat=len(Remaining._fields))]
    return ((each, decide(*each)) for each in product(Ending, terms, delivered, means))


def sends(verdict: Verdict) -> bool:
    return isinstance(verdict, Retry | Resume)


# --- what must never happen ------------------------------------------------------------------------------------------


def test_no_second_handler_runs_against_the_callers_will():
    for (ending, terms, delivered, _means), verdict in every():
        if isinstance(verdict, Retry) and ending not in NO_HANDLER:
            assert terms.idempotent
            assert not terms.resume, "a stream that can be resumed does not begin again"
            assert terms.unary or not (delivered.read or delivered.unread), "the caller would see two beginnings"
        if isinstance(verdict, Resume):
            assert terms.resume
            assert ending not in NO_HANDLER
            assert not delivered.unread, "items that have arrived are read before the stream goes on"


def test_nothing_is_sent_again_that_cannot_or_must_not_be():
    for (ending, terms, _delivered, means), verdict in every():
        if not sends(verdict):
            continue
        assert ending not in FINAL
        if ending in ON_THE_WIRE:
            assert not terms.streams_requests, "requests of an iterator cannot be taken back"
            assert not terms.stopped, "the caller wants the call to end"
        if ending is not Ending.STALLED:
            assert not means.closed
        assert means.attempts_left


def test_what_could_multiply_an_outage_is_paid_for():
    for (ending, _terms, delivered, means), verdict in every():
        if isinstance(verdict, Retry):
            assert verdict.paid == (ending is Ending.OVERLOADED or ending not in NO_HANDLER)
        if isinstance(verdict, Resume):
            assert verdict.paid != delivered.advanced
        if verdict.paid:
            assert means.budget
        if isinstance(verdict, Resume):
            assert means.resumptions_left


def test_silence_never_fails_a_call():
    for (ending, _, _, means), verdict in every():
        if ending in ALIVE:
            assert not isinstance(verdict, Fail)
            if verdict != STAY:
                assert means.others, "a worker that may wake is left only for one that is there"


def test_only_what_may_change_waits():
    for (ending, terms, delivered, _means), verdict in every():
        if verdict in (STAY, READ_FIRST):
            assert ending in ALIVE or (verdict == READ_FIRST and delivered.unread and terms.resume)


def test_a_verdict_that_costs_nothing_does_not_look_at_the_budget():
    for (ending, terms, delivered, means), verdict in every():
        if sends(verdict) and not verdict.paid:
            assert decide(ending, terms, delivered, means._replace(budget=not means.budget)) == verdict


# --- what is expected, for every combination -------------------------------------------------------------------------


def expected(ending: Ending, terms: Terms, delivered: Delivered, means: Remaining) -> Verdict:
    """The verdict of the first rule that holds."""
    sent_once = ending in ON_THE_WIRE
    open_ended = ending in {Ending.LOST, Ending.CUT, Ending.SILENT}  # A handler has begun or may have.
    resumes = terms.resume and open_ended and not terms.streams_requests
    unseen = terms.unary or delivered == (False, False, delivered.advanced)
    pays = ending is Ending.OVERLOADED or (open_ended and not (resumes and delivered.advanced))
    no_place = not (means.attempts_left and means.others)
    kept = STAY if ending is Ending.SILENT else None  # what a silent worker's call does where others' calls fail
    incomplete = Error.INCOMPLETE if open_ended else Error.REFUSED
    if ending is Ending.FAILED:
        return Fail(Error.REPORTED)
    if ending is Ending.CANCELLED:
        return Fail(Error.INCOMPLETE)
    if ending in ALIVE and no_place:
        return STAY
    if ending is Ending.SILENT and (terms.stopped or terms.streams_requests or means.closed):
        return STAY
    if resumes and delivered.unread:
        return READ_FIRST
    if open_ended and terms.stopped and (terms.idempotent or resumes):
        return Fail(incomplete, STOPPED)
    if resumes and not means.resumptions_left:
        return kept or Fail(incomplete, TOO_OFTEN)
    if sent_once and not resumes and terms.streams_requests:
        return Fail(incomplete)
    if open_ended and not resumes and not (terms.idempotent and unseen):
        return kept or Fail(incomplete)
    if sent_once and terms.stopped:
        return Fail(incomplete)
    if pays and not means.budget:
        return kept or Fail(incomplete, NO_BUDGET if open_ended else "")
    if means.closed and ending is not Ending.STALLED:
        return Fail(Error.CLOSED)
    if not means.attempts_left:
        return Fail(Error.EXHAUSTED)
    return Resume(paid=pays) if resumes else Retry(paid=pays, redial=ending in {Ending.CUT_OFF, Ending.UNSENT})


def test_every_combination():
    seen: Counter[str] = Counter()
    for combination, verdict in every():
        assert verdict == expected(*combination), combination
        seen[f"{combination[0].name} {verdict}"] += 1
    assert seen.total() == len(Ending) * 2**13
    assert len(seen) == 47, sorted(seen)  # the ways in which an attempt can end and go on


# --- the rows that matter most, to be read ---------------------------------------------------------------------------

PLAIN = Terms(idempotent=False, unary=False, resume=False, streams_requests=False, stopped=False)
IDEMPOTENT = PLAIN._replace(idempotent=True)
UNARY = IDEMPOTENT._replace(unary=True)
RESUMES = PLAIN._replace(resume=True)
NOTHING = Delivered(read=False, unread=False, advanced=False)
SOME = Delivered(read=True, unread=False, advanced=True)
UNREAD = Delivered(read=False, unread=True, advanced=False)
ALL = Remaining(attempts_left=True, others=True, resumptions_left=True, budget=True, closed=False)
POOR = ALL._replace(budget=False)
LAST = ALL._replace(attempts_left=False)
ALONE = ALL._replace(others=False)

INCOMPLETE = Fail(Error.INCOMPLETE)


@pytest.mark.parametrize(
    ("ending", "terms", "delivered", "means", "verdict"),
    [
        # No handler began: it goes elsewhere without asking the caller, and only load that comes back costs budget.
        (Ending.UNREACHED, PLAIN, NOTHING, POOR, Retry()),
        (Ending.UNSENT, PLAIN, NOTHING, POOR, Retry(redial=True)),
        (Ending.CUT_OFF, PLAIN, NOTHING, POOR, Retry(redial=True)),
        (Ending.REFUSED, PLAIN, NOTHING, POOR, Retry()),
        (Ending.OVERLOADED, PLAIN, NOTHING, ALL, Retry(paid=True)),
        (Ending.OVERLOADED, PLAIN, NOTHING, POOR, Fail(Error.REFUSED)),
        (Ending.REFUSED, PLAIN, NOTHING, LAST, Fail(Error.EXHAUSTED)),
        (Ending.REFUSED, PLAIN._replace(stopped=True), NOTHING, ALL, Fail(Error.REFUSED)),
        (Ending.REFUSED, PLAIN._replace(streams_requests=True), NOTHING, ALL, Fail(Error.REFUSED)),
        (Ending.CUT_OFF, PLAIN, NOTHING, ALL._replace(closed=True), Fail(Error.CLOSED)),
        (Ending.UNREACHED, PLAIN._replace(streams_requests=True), NOTHING, ALL, Retry()),
        (Ending.UNREACHED, PLAIN._replace(stopped=True), NOTHING, ALL, Retry()),
        # A handler began, or may have: only with the caller's leave, and only while the caller has seen nothing.
        (Ending.LOST, PLAIN, NOTHING, ALL, INCOMPLETE),
        (Ending.LOST, IDEMPOTENT, NOTHING, ALL, Retry(paid=True)),
        (Ending.CUT, IDEMPOTENT, NOTHING, ALL, Retry(paid=True)),
        (Ending.LOST, IDEMPOTENT, UNREAD, ALL, INCOMPLETE),
        (Ending.LOST, IDEMPOTENT, SOME, ALL, INCOMPLETE),
        (Ending.LOST, UNARY, SOME, ALL, Retry(paid=True)),
        (Ending.LOST, IDEMPOTENT, NOTHING, POOR, Fail(Error.INCOMPLETE, NO_BUDGET)),
        (Ending.LOST, IDEMPOTENT._replace(stopped=True), NOTHING, ALL, Fail(Error.INCOMPLETE, STOPPED)),
        (Ending.LOST, IDEMPOTENT._replace(streams_requests=True), NOTHING, ALL, INCOMPLETE),
        (Ending.LOST, IDEMPOTENT, NOTHING, LAST, Fail(Error.EXHAUSTED)),
        # A stream that can be resumed: what has arrived is read first, and a stream that advances costs no budget.
        (Ending.LOST, RESUMES, UNREAD, ALL, READ_FIRST),
        (Ending.LOST, RESUMES, SOME, POOR, Resume()),
        (Ending.CUT, RESUMES, SOME, POOR, Resume()),
        (Ending.LOST, RESUMES, NOTHING, ALL, Resume(paid=True)),
        (Ending.LOST, RESUMES, NOTHING, POOR, Fail(Error.INCOMPLETE, NO_BUDGET)),
        (Ending.LOST, RESUMES, SOME, ALL._replace(resumptions_left=False), Fail(Error.INCOMPLETE, TOO_OFTEN)),
        (Ending.LOST, RESUMES._replace(stopped=True), SOME, ALL, Fail(Error.INCOMPLETE, STOPPED)),
        (Ending.CUT_OFF, RESUMES, SOME, ALL, Retry(redial=True)),
        # A silent worker may wake: it is left only for one that is there, by calls that may be sent again.
        (Ending.SILENT, PLAIN, NOTHING, ALL, STAY),
        (Ending.SILENT, IDEMPOTENT, NOTHING, ALL, Retry(paid=True)),
        (Ending.SILENT, IDEMPOTENT, NOTHING, ALONE, STAY),
        (Ending.SILENT, IDEMPOTENT, NOTHING, POOR, STAY),
        (Ending.SILENT, IDEMPOTENT, SOME, ALL, STAY),
        (Ending.SILENT, RESUMES, UNREAD, ALL, READ_FIRST),
        (Ending.SILENT, RESUMES, SOME, POOR, Resume()),
        (Ending.SILENT, RESUMES, SOME, ALL._replace(resumptions_left=False), STAY),
        (Ending.STALLED, PLAIN, NOTHING, POOR, Retry()),
        (Ending.STALLED, PLAIN, NOTHING, ALONE, STAY),
        # What the worker says is the answer.
        (Ending.FAILED, UNARY, NOTHING, ALL, Fail(Error.REPORTED)),
        (Ending.CANCELLED, UNARY, NOTHING, ALL, INCOMPLETE),
    ],
)  # fmt: skip
def test_a_row(ending: Ending, terms: Terms, delivered: Delivered, means: Remaining, verdict: Verdict):
    assert decide(ending, terms, delivered, means) == verdict
