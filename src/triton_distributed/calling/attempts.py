"""A call's attempts: how one ended, which instances were tried, which are next, and the error if none is left. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from triton_distributed.calling.failover import Ending
from triton_distributed.errors import ConnectionFailed, DeadlineExceeded, Draining, InvalidRequest, Overloaded, Paused
from triton_distributed.names import Instance
from triton_distributed.observe import Outcome
from triton_distributed.payload.exceptions import decode_error
from triton_distributed.transport.stream import Stream
from triton_distributed.wire import frames as f


class Attempts:
    """The instances that did not take a call's request.

    Attributes:
        tried: their ids.
        failures: (address, reason) of each, in order, for error texts.
        refusal: the refusal to report if no instance takes the request; None where none gave one.
    """

    __slots__ = ("_redial", "failures", "refusal", "tried")

    def __init__(self) -> None:
        self.tried: set[int] = set()
        self.failures: list[tuple[str, str]] = []
        self.refusal: Exception | None = None
        self._redial: set[int] = set()  # Those of `tried` that may be dialled once more.

    def record(
        self,
        instance_id: int,
        failures: Sequence[tuple[str, str]],
        refusal: Exception | None = None,
        redial: bool = False,
    ) -> None:
        """Record that an instance did not take the request.

        Args:
            instance_id: of the instance.
            failures: (address, reason) each.
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
            # Not all instances are shutting down: to come back later makes sense.
            refusal = Overloaded(known.endpoint, known.instance_id, known.reason, len(self.tried), known.retry_after_s)
        self.refusal = refusal or known

    def next(
        self, in_rotation: tuple[Instance, ...], listed: tuple[Instance, ...], direct: bool
    ) -> tuple[Instance, ...]:
        """The instances among which the policy chooses next; empty where none is left.

        Args:
            in_rotation: the candidates of a new call.
            listed: all instances that discovery knows.
            direct: the caller wants one instance and no other.
        """
        if not self.tried:
            return in_rotation
        rest: tuple[Instance, ...] = ()
        if not direct:
            rest = tuple(each for each in in_rotation if each.id not in self.tried)
            if not rest:  # An instance that is out of rotation is better than none.
                rest = tuple(each for each in listed if each.id not in self.tried)
        return rest or tuple(each for each in listed if each.id in self._redial)

    def chosen(self, instance_id: int) -> None:
        """Record that the policy has chosen this instance, so that it is not dialled a third time."""
        self._redial.discard(instance_id)

    def error(self, target: str) -> Exception:
        """What the caller gets when no instance is left to try.

        Args:
            target: what was called, for the text.
        """
        return self.refusal or ConnectionFailed(target, self.failures)


class Ended(NamedTuple):
    """How an attempt ended.

    Attributes:
        ending: in one word.
        reason: why, for error texts.
        began: a handler has begun or may have begun.
        code: of the frame that ended it, if there was one.
        detail: of that frame.
    """

    ending: Ending
    reason: str
    began: bool = True
    code: int = 0
    detail: bytes = b""


def ended(stream: Stream, items_read: bool) -> Ended:
    """How the attempt ended whose stream closed early.

    Args:
        stream: it was lost, refused or failed, or the worker cancelled it.
        items_read: the reader has items of this call.
    """
    if stream.lost is not None:
        session = stream.session
        began = bool(stream.accepted or stream.inbox or items_read)
        # An ACCEPT may have been lost with the connection, but not one to a request that never left.
        sure = not began and (not session.possibly_incomplete or stream.id in session.unsent)
        return Ended(Ending.CUT_OFF if sure else Ending.LOST, stream.lost, began)
    if stream.failure is None:
        return Ended(Ending.CANCELLED, "the worker cancelled the stream")
    kind, code, detail = stream.failure
    if kind == f.REJECT and code == f.RejectCode.OVERLOADED:
        return Ended(Ending.OVERLOADED, f.read_overloaded(detail)[0], False, code, detail)
    words = detail.decode("utf-8", "replace")
    if kind == f.REJECT:
        return Ended(Ending.REFUSED, words, False, code, detail)
    return Ended(Ending.CUT if code == f.ErrorCode.CANCELLED else Ending.FAILED, words, True, code, detail)


def disowned(how: Ended) -> bool:
    """The worker says that it does not serve the instance now."""
    return how.ending is Ending.REFUSED and how.code in (f.RejectCode.UNKNOWN, f.RejectCode.PAUSED)


def refusal(how: Ended, path: str, instance_id: int, tries: int) -> Exception | None:
    """The error of an attempt that was refused; None where the reason says nothing to a caller.

    Args:
        how: the attempt ended.
        path: of the endpoint.
        instance_id: of the worker.
        tries: instances that were tried, this one included.
    """
    if how.ending is Ending.OVERLOADED:
        return Overloaded(path, instance_id, how.reason, tries, f.read_overloaded(how.detail)[1])
    if how.code == f.RejectCode.PAUSED:
        return Paused(path, instance_id, how.reason, tries)
    return Draining(path, instance_id, how.reason, tries) if how.code == f.RejectCode.DRAINING else None


def reported(
    how: Ended, target: str, instance_id: int, request_id: str, timeout_s: float | None
) -> tuple[BaseException, Outcome] | None:
    """The error that a worker reports, and how the call has ended; None where the stream is only incomplete.

    Args:
        how: the attempt ended.
        target: what was called, for error texts.
        instance_id: of the worker.
        request_id: of the request.
        timeout_s: seconds that the caller gave the call.
    """
    if how.code == f.ErrorCode.HANDLER:
        return decode_error(how.detail, instance_id=instance_id, request_id=request_id), Outcome.ERROR
    if how.code == f.ErrorCode.INVALID:
        return InvalidRequest(target, how.reason.removeprefix("Invalid request: ")), Outcome.INVALID
    if how.code == f.ErrorCode.DEADLINE:
        return DeadlineExceeded(target, timeout_s or 0.0), Outcome.DEADLINE
    return None
