"""The failed attempts of a call: which instances are next, and which error the caller gets if none is left. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from triton_distributed.calling.failover import Ending
from triton_distributed.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    Overloaded,
    Paused,
    Refusal,
    TritonError,
)
from triton_distributed.names import Instance
from triton_distributed.observe import Outcome
from triton_distributed.payload.exceptions import decode_error
from triton_distributed.transport.stream import Stream
from triton_distributed.wire import frames as f

LEFT = "its `async for` was left or its reader was dropped, which cancels the handler"
UNREADABLE = "a message from the worker could not be read, which ended the call"
NOT_ITS_FAULT = (InvalidRequest, Refusal)
"""Errors that do not count against an instance: they come from calls that its handler made to other workers."""


def unplaced(error: BaseException) -> Outcome:
    """The outcome of a call that no instance takes, or whose policy or iterator of requests raised `error`."""
    if isinstance(error, Refusal):
        return Outcome.REFUSED
    return Outcome.UNREACHABLE if isinstance(error, TritonError) else Outcome.ERROR


class Attempts:
    """The instances that did not take a call's request.

    Attributes:
        tried: their ids.
        failures: (address, reason) of each, in order, for error texts.
        refusal: the refusal to report if no instance takes the request; None if no instance gave one.
    """

    __slots__ = ("_redial", "failures", "refusal", "tried")

    def __init__(self) -> None:
        self.tried: set[int] = set()
        self.failures: list[tuple[str, str]] = []
        self.refusal: Exception | None = None
        self._redial: set[int] = set()  # The tried instances that may be dialled once more.

    def record(
        self,
        instance_id: int,
        failures: Sequence[tuple[str, str]],
        refusal: Exception | None = None,
        redial: bool = False,
    ) -> None:
        """Record that an instance did not take the request.

        Args:
            instance_id: the instance's id.
            failures: pairs of address and reason.
            refusal: the error for the caller if no instance takes it.
            redial: the connection was lost before a handler began, which says little about the worker. If no other
                instance is left, it is dialled again, once.
        """
        if redial and instance_id not in self.tried:
            self._redial.add(instance_id)
        self.tried.add(instance_id)
        self.failures += failures
        known = self.refusal
        if isinstance(known, Overloaded) and isinstance(refusal, (Draining, Paused)):
            # At least one instance is not shutting down, so the caller should try again later.
            refusal = Overloaded(known.endpoint, known.instance_id, known.reason, len(self.tried), known.retry_after_s)
        self.refusal = refusal or known

    def next(
        self, in_rotation: tuple[Instance, ...], listed: tuple[Instance, ...], direct: bool
    ) -> tuple[Instance, ...]:
        """The instances from which the policy chooses next; empty if none is left.

        Args:
            in_rotation: the candidates of a new call.
            listed: all instances that discovery knows.
            direct: the caller allows only one instance.
        """
        if not self.tried:
            return in_rotation
        rest: tuple[Instance, ...] = ()
        if not direct:
            rest = tuple(each for each in in_rotation if each.id not in self.tried)
            if not rest:  # An instance out of rotation is better than no instance.
                rest = tuple(each for each in listed if each.id not in self.tried)
        return rest or tuple(each for each in listed if each.id in self._redial)

    def chosen(self, instance_id: int) -> None:
        """Record that the policy has chosen this instance, so that it is not dialled a third time."""
        self._redial.discard(instance_id)

    def returned(self, ids: Collection[int]) -> None:
        """Let these instances be tried once more: they were gone and are registered again."""
        self._redial |= self.tried.intersection(ids)

    def error(self, target: str) -> Exception:
        """The error for the caller when no instance is left to try.

        Args:
            target: the name of what was called, for the text.
        """
        return self.refusal or ConnectionFailed(target, self.failures)


class AttemptEnd(NamedTuple):
    """How an attempt ended.

    Attributes:
        ending: the kind of end.
        reason: why the attempt ended, for error texts.
        began: a handler has begun or may have begun.
        code: the code of the frame that ended the attempt, if there was one.
        detail: the detail of that frame.
    """

    ending: Ending
    reason: str
    began: bool = True
    code: int = 0
    detail: bytes = b""


def end_of(stream: Stream, items_read: bool) -> AttemptEnd:
    """Return how an attempt ended, from its stream, which closed early.

    Args:
        stream: the stream, which was lost, refused or cancelled by the worker, or failed.
        items_read: the reader has items of this call.
    """
    if stream.lost is not None:
        session = stream.session
        began = bool(stream.accepted or stream.inbox or items_read)
        # If bytes may be missing, an ACCEPT may be among them, unless the request was never sent completely.
        sure = not began and (not session.possibly_incomplete or stream.id in session.unsent)
        return AttemptEnd(Ending.CUT_OFF if sure else Ending.LOST, stream.lost, began)
    if stream.failure is None:
        return AttemptEnd(Ending.CANCELLED, "the worker cancelled the stream")
    kind, code, detail = stream.failure
    if kind == f.REJECT and code == f.RejectCode.OVERLOADED:
        return AttemptEnd(Ending.OVERLOADED, f.read_overloaded(detail)[0], False, code, detail)
    words = detail.decode("utf-8", "replace")
    if kind == f.REJECT:
        return AttemptEnd(Ending.REFUSED, words, False, code, detail)
    return AttemptEnd(Ending.CUT if code == f.ErrorCode.CANCELLED else Ending.FAILED, words, True, code, detail)


def disowned(how: AttemptEnd) -> bool:
    """Whether the worker has answered that it does not serve the instance now."""
    return how.ending is Ending.REFUSED and how.code in (f.RejectCode.UNKNOWN, f.RejectCode.PAUSED)


def refusal(how: AttemptEnd, path: str, instance_id: int, tries: int) -> Exception | None:
    """Return the error of a refused attempt; None if the reason is of no use to a caller.

    Args:
        how: the end of the attempt.
        path: the endpoint's path.
        instance_id: the worker's instance id.
        tries: the number of instances tried, this one included.
    """
    if how.ending is Ending.OVERLOADED:
        return Overloaded(path, instance_id, how.reason, tries, f.read_overloaded(how.detail)[1])
    if how.code == f.RejectCode.PAUSED:
        return Paused(path, instance_id, how.reason, tries)
    return Draining(path, instance_id, how.reason, tries) if how.code == f.RejectCode.DRAINING else None


def reported(
    how: AttemptEnd, target: str, instance_id: int, request_id: str, timeout_s: float | None
) -> tuple[BaseException, Outcome] | None:
    """Return the error that a worker reported and the outcome of the call; None if the stream is only incomplete.

    Args:
        how: the end of the attempt.
        target: the name of what was called, for error texts.
        instance_id: the worker's instance id.
        request_id: the request's id.
        timeout_s: seconds that the caller gave the call.
    """
    if how.code == f.ErrorCode.HANDLER:
        return decode_error(how.detail, instance_id=instance_id, request_id=request_id), Outcome.ERROR
    if how.code == f.ErrorCode.INVALID:
        return InvalidRequest(target, how.reason.removeprefix("Invalid request: ")), Outcome.INVALID
    if how.code == f.ErrorCode.DEADLINE:
        return DeadlineExceeded(target, timeout_s or 0.0), Outcome.DEADLINE
    return None


def in_words(error: BaseException) -> str:
    """An error as one text: its type and its message."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # The `__str__` of a user's exception may fail.
        return type(error).__name__
