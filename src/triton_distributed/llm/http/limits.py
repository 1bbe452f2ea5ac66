"""What the front end refuses before an app sees it: missing keys, too large requests, too many at once. Pure."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from triton_distributed.llm.http.head import Head
from triton_distributed.llm.http.keys import Keys

MAX_HEAD_BYTES = 64 * 1024
"""The most that the line and the headers of a request may have. Nginx and most proxies allow 32 KiB or less."""

BUSY_S = 1
"""`Retry-After` of a request that is one too many."""


class Refusal(NamedTuple):
    """Why a request is refused.

    Attributes:
        status, code, text: of the response.
        headers: further ones of the response.
    """

    status: int
    code: str
    text: str
    headers: tuple[tuple[bytes, bytes], ...] = ()

    def body(self, openai: bool, request_id: str) -> tuple[bytes, bytes]:
        """The media type and the body: in the form of the OpenAI API, or as in RFC 9457."""
        if not openai:
            found = {"status": self.status, "code": self.code, "detail": self.text, "request_id": request_id}
            return b"application/problem+json", msgspec.json.encode(found)
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.text, "type": kind, "param": None, "code": self.code}
        return b"application/json", msgspec.json.encode({"error": error})


class Limits:
    """What is allowed of a request.

    Args:
        keys: the API keys.
        max_body_bytes: the largest body.
        max_requests: requests that may run at once; None for no limit.
    """

    def __init__(self, keys: Keys, max_body_bytes: int, max_requests: int | None) -> None:
        self._keys = keys
        self._max_body_bytes, self._max_requests = max_body_bytes, max_requests

    def refusal(self, head: Head, running: int) -> Refusal | None:
        """Decide whether a request is refused.

        Args:
            head: of the request.
            running: how many others run.
        """
        if head.size > MAX_HEAD_BYTES:
            return Refusal(431, "headers_too_large", f"The headers have more than {MAX_HEAD_BYTES:,} bytes.")
        if self._keys and not self._keys.allow(head.authorization):
            text = "The API key is missing or wrong. Send it as: Authorization: Bearer KEY"
            return Refusal(401, "invalid_api_key", text, _BEARER)
        if head.length > self._max_body_bytes:
            text = f"The body has {head.length:,} bytes, above the limit of {self._max_body_bytes:,}."
            # The connection stays: the server reads the rest of the body and drops it. A client that still writes would
            # lose the answer if the connection were closed.
            return Refusal(413, "request_too_large", text)
        if self._max_requests is not None and running >= self._max_requests:
            return Refusal(503, "overloaded", "The server is at capacity. Try again later.", _LATER)
        return None


def ending() -> Refusal:
    """The refusal of a request that is not answered within the time of the drain."""
    return Refusal(503, "unavailable", "The server ends before the answer is complete. Try again.", _LATER)


_BEARER = ((b"www-authenticate", b"Bearer"),)
_LATER = ((b"retry-after", b"%d" % BUSY_S), (b"retry-after-ms", b"%d" % (BUSY_S * 1000)))
_TYPES = {401: "authentication_error", 503: "overloaded_error"}
