"""What a worker says of a stream that it refused or that failed, as the error that the caller gets."""

from __future__ import annotations

from triton_distributed.errors import DeadlineExceeded, Draining, InvalidRequest, Overloaded, Paused
from triton_distributed.observe import Outcome
from triton_distributed.payload.exceptions import decode_error
from triton_distributed.wire import frames as f


def refusal(code: int, detail: bytes, path: str, instance_id: int, tries: int) -> tuple[str, Exception | None]:
    """The words of a REJECT, and the error where it is one that a caller should know if nobody takes the request.

    Args:
        path: of the endpoint.
        tries: instances that were tried, this one included.
    """
    if code == f.RejectCode.OVERLOADED:
        words, retry_after_s = f.read_overloaded(detail)
        return words, Overloaded(path, instance_id, words, tries, retry_after_s)
    words = detail.decode("utf-8", "replace")
    if code == f.RejectCode.PAUSED:
        return words, Paused(path, instance_id, words, tries)
    return words, Draining(path, instance_id, words, tries) if code == f.RejectCode.DRAINING else None


def failure(
    code: int, detail: bytes, target: str, instance_id: int, request_id: str, timeout_s: float | None
) -> tuple[BaseException, Outcome] | None:
    """The error of an ERROR, and how the call has ended; None where it only says that the stream is incomplete."""
    if code == f.ErrorCode.HANDLER:
        return decode_error(detail, instance_id=instance_id, request_id=request_id), Outcome.ERROR
    if code == f.ErrorCode.INVALID:
        words = detail.decode("utf-8", "replace")
        return InvalidRequest(target, words.removeprefix("Invalid request: ")), Outcome.INVALID
    if code == f.ErrorCode.DEADLINE:
        return DeadlineExceeded(target, timeout_s or 0.0), Outcome.DEADLINE
    return None
