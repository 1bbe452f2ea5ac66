"""Errors of calls as HTTP answers: a status, `Retry-After`, and a body that shows nothing internal."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from triton_distributed.api.contracts import ContractMismatch
from triton_distributed.context import current
from triton_distributed.errors import (
    BrokerError,
    ConnectionFailed,
    DeadlineExceeded,
    DecodeError,
    DiscoveryError,
    Draining,
    InstanceNotFound,
    InvalidRequest,
    MessageTooLarge,
    NoInstances,
    NotUnary,
    Overloaded,
    Paused,
    RemoteError,
    RuntimeClosed,
    StreamClosed,
    StreamIncomplete,
    TooFewInstances,
    TritonError,
)
from triton_distributed.integrations.http.request import HttpContext
from triton_distributed.integrations.http.text import to_json

logger = logging.getLogger("triton_distributed.http")

_AGAIN = "The service is not available at the moment. Try again later."
_BAD_ANSWER = "The service gave an invalid answer."
_FAILED = "The service failed."

# The first row that fits counts. The texts name no instance, address or path: a client outside must not see them.
_ROWS: tuple[tuple[type[TritonError], int, str], ...] = (
    (Overloaded, 503, "The service is at capacity. Try again later."),
    (Draining, 503, _AGAIN),
    (Paused, 503, _AGAIN),
    (NoInstances, 503, _AGAIN),
    (TooFewInstances, 503, _AGAIN),
    (InstanceNotFound, 503, _AGAIN),
    (ConnectionFailed, 503, _AGAIN),
    (DiscoveryError, 503, _AGAIN),
    (BrokerError, 503, _AGAIN),
    (RuntimeClosed, 503, _AGAIN),
    (DeadlineExceeded, 504, "The service did not answer in time."),
    (StreamClosed, 500, _FAILED),
    (StreamIncomplete, 502, "The connection to the service was lost before its answer was complete."),
    (RemoteError, 500, _FAILED),
    (NotUnary, 502, _BAD_ANSWER),
    (DecodeError, 502, _BAD_ANSWER),
    (ContractMismatch, 502, "The service expects other requests than this gateway sends."),
    (InvalidRequest, 422, ""),
    (MessageTooLarge, 413, ""),
)


class Problem(NamedTuple):
    """An error as a client of the gateway sees it.

    Attributes:
        status: the HTTP status.
        code: the kind of error, for programs: `overloaded`, `deadline_exceeded`, …
        detail: a sentence for people.
        request_id: the id of the HTTP request; empty outside of one.
        retry_after_s: whole seconds after which the request may be sent again; None if that does not help.
    """

    status: int
    code: str
    detail: str
    request_id: str
    retry_after_s: int | None

    def body(self) -> dict[str, Any]:
        """The members of RFC 9457, of which `detail` is also FastAPI's, and those of this kit."""
        found = {"status": self.status, "code": self.code, "detail": self.detail}
        return found | ({"request_id": self.request_id} if self.request_id else {})

    def response(self) -> Response:
        """The HTTP response."""
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        return Response(to_json(self.body()), self.status, headers, "application/problem+json")


def problem_of(error: BaseException) -> Problem:
    """Describe an error for the client of the gateway."""
    http = _http()
    kind, status, detail = _row(error)
    if isinstance(error, InvalidRequest) and kind is InvalidRequest:
        detail = error.reason
    elif isinstance(error, MessageTooLarge) and kind is MessageTooLarge:
        detail = f"The request has {error.size:,} bytes, above the limit of {error.limit:,}."
    elif kind is RemoteError and http is not None and http.show_errors:
        detail = str(error)
    code = "internal_error" if kind is None else re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()
    wait = max(1, math.ceil(_retry_after_s(error))) if status == 503 else None
    return Problem(status, code, detail, _request_id(), wait)


def ending() -> Problem:
    """Describe that the server of the gateway ends before an answer is complete."""
    return Problem(503, "unavailable", "The server ends before the answer is complete. Try again.", _request_id(), 1)


def reported(error: BaseException) -> Problem:
    """Describe an error, and log what the description does not show."""
    problem = problem_of(error)
    cancelled = isinstance(error, asyncio.CancelledError)
    failed = problem.status in (500, 502) and not cancelled
    # The worker logs the traceback of its own error. Only the traceback of an error of this process is logged here.
    unknown = problem.status == 500 and not cancelled and not isinstance(error, RemoteError)
    logger.log(
        logging.ERROR if failed else logging.INFO,
        "HTTP request %s: %d: %s",
        problem.request_id,
        problem.status,
        _words(error),
        exc_info=error if unknown else None,
    )
    return problem


def _http() -> HttpContext | None:
    context = current.get()
    return context if isinstance(context, HttpContext) else None


def _request_id() -> str:
    http = _http()
    return "" if http is None else http.id()


def _row(error: BaseException) -> tuple[type[TritonError] | None, int, str]:
    if isinstance(error, asyncio.CancelledError):
        return None, 500, "The gateway cancelled the call."
    for kind, status, detail in _ROWS:
        if isinstance(error, kind):
            return kind, status, detail
    return None, 500, _FAILED


def _retry_after_s(error: BaseException) -> float:
    seconds = getattr(error, "retry_after_s", 0.0)
    return seconds if isinstance(seconds, int | float) and 0 < seconds < 3600 else 0.0


def _words(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # The `__str__` of a user's exception may fail.
        return type(error).__name__


async def answer_error(request: Request, error: Exception) -> Response:
    """Answer an error of a call. A handler of the app for the type that the worker raised takes precedence."""
    own = _own_handler(request.app.exception_handlers, error)
    if own is None:
        return reported(error).response()
    if inspect.iscoroutinefunction(own):
        found = await own(request, error)
    else:
        found = await run_in_threadpool(own, request, error)
    return found if isinstance(found, Response) else reported(error).response()


def _own_handler(handlers: Mapping[Any, Callable[..., Any]], error: Exception) -> Callable[..., Any] | None:
    """The app's handler for the type that a worker's handler raised, e.g. an error class of the user."""
    if not isinstance(error, RemoteError):
        return None
    raised = (each for each in type(error).__mro__ if each not in RemoteError.__mro__)
    return next((handlers[each] for each in raised if each in handlers), None)
