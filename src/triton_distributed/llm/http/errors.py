"""Errors as the OpenAI API shows them: a status, headers, and a body whose text names no instance or address."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from triton_distributed.errors import (
    BrokerError,
    ConnectionFailed,
    DeadlineExceeded,
    DiscoveryError,
    InvalidRequest,
    MessageTooLarge,
    NoInstances,
    Overloaded,
    RemoteError,
    RuntimeClosed,
    StreamIncomplete,
    TritonError,
)
from triton_distributed.errors import Refusal as _Refusal
from triton_distributed.llm.contract.errors import (
    AnswerLost,
    EngineDead,
    EngineStalled,
    InvalidParameter,
    ModelNotFound,
    PrefillOnly,
)
from triton_distributed.llm.http.bodies import field_of
from triton_distributed.llm.routing.view import PolicyFailed

logger = logging.getLogger("triton_distributed.llm.http")

_AGAIN_S = 1.0
"""`Retry-After` where nothing better is known: a worker that restarts is back after about this time."""


class Refused(Exception):
    """A request that is refused before a model is asked. Fields: those of `Shown`."""

    def __init__(self, status: int, message: str, code: str, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(status, message, code, *headers)
        self.status, self.message, self.code, self.headers = status, message, code, headers


class Ending(Exception):
    """The server ends before the answer is complete."""


class Shown(NamedTuple):
    """What a caller sees of an error."""

    status: int
    message: str
    type: str = "server_error"
    param: str | None = None
    code: str | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def json(self) -> bytes:
        """The body."""
        return msgspec.json.encode(
            {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        )


def shown(error: BaseException) -> Shown:
    """Return what a caller sees of an error. One that is not foreseen is logged with its traceback."""
    for kinds, show in _ROWS:
        if isinstance(error, kinds):
            return show(error)
    logger.error("a request failed because of a defect of the front end", exc_info=error)
    return Shown(500, "The server failed.", code="internal_error", headers=((b"x-should-retry", b"false"),))


def _invalid(error: Any) -> Shown:
    param, code = getattr(error, "param", None), getattr(error, "code", None)  # One of a worker may lack them.
    return Shown(400, str(error), "invalid_request_error", param or None, code or None)


def _refused(error: Any) -> Shown:
    kind = "overloaded_error" if error.status == 503 else "invalid_request_error"
    return Shown(error.status, error.message, kind, None, error.code, error.headers)


def _not_json(error: Any) -> Shown:
    if not isinstance(error, msgspec.ValidationError):
        return Shown(400, f"The body is not valid JSON: {error}", "invalid_request_error", None, "invalid_json")
    words, field = field_of(str(error))
    text = f"{field}: {words}" if field and f"`{field}`" not in words else words
    return Shown(400, text, "invalid_request_error", field or None, "invalid_value")


def _too_deep(error: Any) -> Shown:
    return Shown(400, "The body nests too deeply.", "invalid_request_error", None, "invalid_json")


def _not_found(error: Any) -> Shown:
    return Shown(404, f"The model `{error.name}` does not exist.", "invalid_request_error", "model", "model_not_found")


def _prefill_only(error: Any) -> Shown:
    return Shown(503, str(error), "server_error", "model", "unavailable", LATER)


def _engine_refused(error: Any) -> Shown:
    reason = getattr(error, "reason", "") or error
    return Shown(400, f"The model refuses the request: {reason}", "invalid_request_error")


def _too_large(error: Any) -> Shown:
    return Shown(413, str(error), "invalid_request_error", None, "request_too_large")


def _overloaded(error: Any) -> Shown:
    seconds = getattr(error, "retry_after_s", 0.0) or _AGAIN_S
    return Shown(
        503, "The model is at capacity. Try again later.", "overloaded_error", None, "overloaded", _after(seconds)
    )


def _unavailable(error: Any) -> Shown:
    return Shown(503, "The model cannot answer at the moment. Try again later.", code="unavailable", headers=LATER)


def _ending(error: Any) -> Shown:
    return Shown(503, "The server ends before the answer is complete. Try again.", code="unavailable", headers=LATER)


def _late(error: Any) -> Shown:
    return Shown(504, "The answer took longer than is allowed.", "timeout_error", None, "timeout")


def _stalled(error: Any) -> Shown:
    text = f"The model has made no progress for {error.seconds:g} s."
    return Shown(504, text, "timeout_error", None, "engine_stalled")


def _lost(error: Any) -> Shown:
    text = f"The worker was lost after {error.tokens} tokens of the answer, and no other can go on: {error.reason}"
    return Shown(502, text, code="answer_lost")


def _broken(error: Any) -> Shown:
    return Shown(502, "The worker of the answer was lost.", code="worker_lost")


def _failed(error: Any) -> Shown:
    logger.error("a model's engine failed: %s", error)
    return Shown(500, "The model's engine failed.", code="engine_error", headers=((b"x-should-retry", b"false"),))


def _policy_failed(error: Any) -> Shown:
    logger.error("%s", error, exc_info=error.__cause__)
    text = "The routing policy of the front end failed; the log of the front end has the reason."
    return Shown(500, text, code="policy_failed", headers=((b"x-should-retry", b"false"),))


def _after(seconds: float) -> tuple[tuple[bytes, bytes], ...]:
    return (
        (b"retry-after", b"%d" % max(1, math.ceil(seconds))),
        (b"retry-after-ms", b"%d" % max(1, math.ceil(seconds * 1000))),  # The openai clients read this one first.
    )


LATER = _after(_AGAIN_S)

# The first row that fits counts. An error of a handler is also an instance of what the handler raised.
_ROWS: tuple[tuple[Any, Callable[[Any], Shown]], ...] = (
    (InvalidParameter, _invalid),
    (Refused, _refused),
    (msgspec.MsgspecError, _not_json),
    (RecursionError, _too_deep),  # Nothing here recurs except over the values of a body.
    (ModelNotFound, _not_found),
    (PrefillOnly, _prefill_only),
    (PolicyFailed, _policy_failed),
    (InvalidRequest, _engine_refused),
    (MessageTooLarge, _too_large),
    (AnswerLost, _lost),
    (EngineDead, _broken),
    (EngineStalled, _stalled),
    (Overloaded, _overloaded),
    (RemoteError, _failed),
    ((_Refusal, NoInstances, ConnectionFailed, DiscoveryError, BrokerError, RuntimeClosed), _unavailable),
    (Ending, _ending),
    (DeadlineExceeded, _late),
    (StreamIncomplete, _broken),
    (TritonError, _failed),
)
