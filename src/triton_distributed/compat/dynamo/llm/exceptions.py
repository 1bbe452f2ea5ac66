"""The exceptions of Dynamo's programs, and the translation of what calls raise.

    DynamoException
    ├── InvalidArgument, EngineShutdown, Cancelled, Unknown    raised by handlers
    ├── WorkerUnavailable (ValueError)         no instance serves the endpoint, or none takes the request
    ├── CannotConnect (ValueError)             no instance could be reached
    ├── Disconnected (ValueError)              the worker was lost in the middle of the stream
    ├── ConnectionTimeout (ValueError)         the call's time is over
    └── StreamIncomplete                       a handler has stopped its own request

In Dynamo a call raises `ValueError`, or `Exception` if no worker takes the request. Here both are `ValueError`.
"""

from __future__ import annotations

from typing import Any

from triton_distributed import errors

__all__ = [
    "Cancelled",
    "CannotConnect",
    "ConnectionTimeout",
    "Disconnected",
    "DynamoException",
    "EngineShutdown",
    "HttpError",
    "InvalidArgument",
    "StreamIncomplete",
    "Unknown",
    "WorkerUnavailable",
]


class DynamoException(Exception):
    """The root of the exceptions that handlers raise and calls report."""


class Unknown(DynamoException):
    """An error of no other kind."""


class InvalidArgument(DynamoException):
    """The request is invalid."""


class CannotConnect(DynamoException, ValueError):
    """No instance could be reached."""


class Disconnected(DynamoException, ValueError):
    """The worker was lost in the middle of the stream."""


class ConnectionTimeout(DynamoException, ValueError):
    """The call's time is over."""


class Cancelled(DynamoException):
    """The request was cancelled."""


class EngineShutdown(DynamoException):
    """The engine has ended."""


class StreamIncomplete(DynamoException):
    """The stream ended before generation was complete."""


class WorkerUnavailable(DynamoException, ValueError):
    """No instance serves the endpoint, or none takes the request."""


class HttpError(Exception):
    """An error with an HTTP status.

    Args:
        code: the status, 0 to 599.
        message: its text; what exceeds 8,192 characters is cut off.

    Raises:
        ValueError: the status or the message is invalid.
    """

    def __init__(self, code: Any, message: Any) -> None:
        if not isinstance(code, int) or isinstance(code, bool) or not 0 <= code < 600:
            raise ValueError(f"code={code!r}: an HTTP status is a whole number from 0 to 599")
        if not isinstance(message, str):
            raise ValueError(f"message={message!r}: must be text")  # noqa: TRY004
        self.code = code
        self.message = message if len(message) <= 8192 else message[:8189] + "..."
        super().__init__(f"HTTP {code}: {self.message}")


def translated(error: Exception) -> Exception:
    """The error that a Dynamo program expects in place of this one; the same error if it is a `ValueError` already."""
    if isinstance(error, ValueError):
        return error
    if isinstance(error, errors.NoInstances | errors.InstanceNotFound | errors.Refusal):
        return WorkerUnavailable(f"No workers available: {error}")
    if isinstance(error, errors.ConnectionFailed):
        return CannotConnect(f"Cannot connect: {error}")
    if isinstance(error, errors.StreamIncomplete):
        return Disconnected(f"Disconnected: Stream ended before generation completed: {error}")
    if isinstance(error, errors.DeadlineExceeded):
        return ConnectionTimeout(f"Timed out: {error}")
    return error
