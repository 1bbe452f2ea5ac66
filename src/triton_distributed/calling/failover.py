"""What a call does after a failed attempt. One pure function decides: no clock, no I/O, no `Call`.

An *attempt* is one instance that was chosen for a request. `decide` takes how the attempt ended, what the caller
allows, what the caller has received and what is left to try with, and returns a verdict. `calling.call` collects these
values and applies the verdict. No other code decides whether a request is sent again.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import ClassVar, NamedTuple

import msgspec

from triton_distributed.calling.resume import REFILL_S


class Ending(Enum):
    """How an attempt ended."""

    UNREACHED = auto()  # The request was not sent: no connection could be made, or the session takes no more streams.
    UNSENT = auto()  # The request was not sent: the connection was lost first.
    STALLED = auto()  # The request is not sent yet: the worker is silent and its connection takes no more bytes.
    CUT_OFF = auto()  # The connection was lost after the request was sent, and no handler can have begun.
    REFUSED = auto()  # The worker refused the request: it drains, is paused, or does not know the instance.
    OVERLOADED = auto()  # The worker refused the request because it is at capacity.
    LOST = auto()  # The connection was lost, and a handler has begun or may have begun.
    CUT = auto()  # The worker cancelled its handler in order to shut down.
    SILENT = auto()  # The worker has sent nothing for a long time. Its handler may still run.
    CANCELLED = auto()  # The worker cancelled the stream.
    FAILED = auto()  # The worker reported an error: of the handler, of the request, or that the deadline has passed.


class Terms(NamedTuple):
    """What the caller allows, and what kind of call it is.

    Attributes:
        idempotent: a second handler may run the request.
        unary: the caller sees the answer only when it is complete.
        resume: another instance may continue the stream after the last item.
        streams_requests: the caller streams its requests, and none of them can be taken back.
        stopped: the caller has asked the handler to stop.
    """

    idempotent: bool
    unary: bool
    resume: bool
    streams_requests: bool
    stopped: bool


class Delivered(NamedTuple):
    """What has arrived from the worker.

    Attributes:
        read: the reader has items.
        unread: items have arrived that the reader has not taken.
        advanced: only with `resume`: the reader has at least one new item from the latest instance.
    """

    read: bool
    unread: bool
    advanced: bool


class Remaining(NamedTuple):
    """The means that are left to send the request again.

    Attributes:
        attempts_left: `TRD_RETRIES` allows another attempt.
        others: another instance is in rotation that has not been tried.
        resumptions_left: the stream may be resumed once more now.
        budget: the client's retry budget allows one more request.
        closed: the runtime was shut down.
    """

    attempts_left: bool
    others: bool
    resumptions_left: bool
    budget: bool
    closed: bool


class Error(Enum):
    """The kind of error that a failed call raises."""

    REPORTED = auto()  # The error that the worker reported.
    INCOMPLETE = auto()  # StreamIncomplete.
    REFUSED = auto()  # The worst refusal of the instances that were tried.
    EXHAUSTED = auto()  # The same, after as many attempts as TRD_RETRIES allows.
    CLOSED = auto()  # RuntimeClosed.


class Fail(msgspec.Struct, frozen=True):
    """The call fails.

    Attributes:
        error: the error that the reader gets.
        note: text added to the reason of a StreamIncomplete.
    """

    error: Error
    note: str = ""
    paid: ClassVar[bool] = False


class Retry(msgspec.Struct, frozen=True):
    """The request is sent to another instance from the start.

    Attributes:
        paid: the attempt is charged to the retry budget.
        redial: the same instance may be dialled again once, if no other is left.
    """

    paid: bool = False
    redial: bool = False


class Resume(msgspec.Struct, frozen=True):
    """Another instance continues the stream after the last resume token.

    Attributes:
        paid: the attempt is charged to the retry budget.
    """

    paid: bool = False


class Stay(msgspec.Struct, frozen=True):
    """The attempt continues."""

    paid: ClassVar[bool] = False


class ReadFirst(msgspec.Struct, frozen=True):
    """The attempt is over. The reader takes the items that have arrived; then `decide` is called with `Ending.LOST`."""

    paid: ClassVar[bool] = False


Verdict = Fail | Retry | Resume | Stay | ReadFirst

NO_BUDGET = "the retry budget is empty, because many calls have failed, so this call is not sent again"
STOPPED = "the caller has asked the handler to stop, so the call is not sent again"
TOO_OFTEN = f"the call was already resumed as often as allowed: TRD_RETRIES times, and once every {REFILL_S:g} s"

STAY = Stay()
READ_FIRST = ReadFirst()


def decide(ending: Ending, terms: Terms, delivered: Delivered, means: Remaining) -> Verdict:
    """Return what the call does after an attempt with this ending.

    A verdict that is `paid` assumes that the budget allows it. The caller of this function charges the budget. If the
    budget refuses, the caller calls `decide` again with `budget=False`.
    """
    match ending:
        case Ending.FAILED:
            return Fail(Error.REPORTED)
        case Ending.CANCELLED:
            return Fail(Error.INCOMPLETE)
        case Ending.UNREACHED | Ending.UNSENT:
            return _if_possible(Retry(redial=ending is Ending.UNSENT), means)
        case Ending.STALLED:
            return Retry() if means.attempts_left and means.others else STAY
        case Ending.REFUSED | Ending.OVERLOADED | Ending.CUT_OFF:
            return _after_refusal(ending, terms, means)
        case Ending.SILENT:
            return _during_silence(terms, delivered, means)
        case Ending.LOST | Ending.CUT:
            resumes = terms.resume and not terms.streams_requests
            return _resumed(terms, delivered, means) if resumes else _begun(terms, delivered, means)


def _if_possible(verdict: Verdict, means: Remaining) -> Verdict:
    if means.closed:
        return Fail(Error.CLOSED)
    return verdict if means.attempts_left else Fail(Error.EXHAUSTED)


def _after_refusal(ending: Ending, terms: Terms, means: Remaining) -> Verdict:
    """Return the verdict if no handler has begun. A stopped call ends here. Streamed requests cannot be taken back."""
    overloaded = ending is Ending.OVERLOADED  # Sending it again adds load to an overloaded fleet.
    if terms.streams_requests or terms.stopped or (overloaded and not means.budget):
        return Fail(Error.REFUSED)
    return _if_possible(Retry(paid=overloaded, redial=ending is Ending.CUT_OFF), means)


def _may_begin_again(terms: Terms, delivered: Delivered) -> bool:
    """Whether the caller allows a second handler and has seen no part of an answer."""
    unseen = terms.unary or not (delivered.read or delivered.unread)
    return terms.idempotent and unseen and not terms.streams_requests


def _begun(terms: Terms, delivered: Delivered, means: Remaining) -> Verdict:
    """Return the verdict if a handler has begun or may have begun."""
    if terms.stopped and terms.idempotent:
        return Fail(Error.INCOMPLETE, STOPPED)
    if not _may_begin_again(terms, delivered):
        return Fail(Error.INCOMPLETE)
    if not means.budget:
        return Fail(Error.INCOMPLETE, NO_BUDGET)
    return _if_possible(Retry(paid=True), means)


def _resumed(terms: Terms, delivered: Delivered, means: Remaining) -> Verdict:
    """Return the verdict if a handler has begun or may have begun, and another one may continue."""
    if delivered.unread:
        return READ_FIRST
    if terms.stopped:
        return Fail(Error.INCOMPLETE, STOPPED)
    if not means.resumptions_left:
        return Fail(Error.INCOMPLETE, TOO_OFTEN)
    if not delivered.advanced and not means.budget:
        return Fail(Error.INCOMPLETE, NO_BUDGET)
    return _if_possible(Resume(paid=not delivered.advanced), means)


def _during_silence(terms: Terms, delivered: Delivered, means: Remaining) -> Verdict:
    """Return the verdict for a silent worker. It may wake up, so a call leaves it only for an instance in rotation,
    and silence never makes a call fail."""
    stays = terms.streams_requests or terms.stopped or means.closed
    if stays or not (means.attempts_left and means.others):
        return STAY
    if terms.resume:
        if delivered.unread:
            return READ_FIRST
        if not means.resumptions_left or not (delivered.advanced or means.budget):
            return STAY
        return Resume(paid=not delivered.advanced)
    return Retry(paid=True) if means.budget and _may_begin_again(terms, delivered) else STAY
