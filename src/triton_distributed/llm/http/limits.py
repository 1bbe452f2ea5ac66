"""What the front end refuses before an app sees it: missing keys, too large requests, too many at once."""

from __future__ import annotations

from collections.abc import Container

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from triton_distributed.llm.http.keys import Keys

MAX_HEAD_BYTES = 64 * 1024
"""The most that the line and the headers of a request may have. Nginx and most proxies allow 32 KiB or less."""

BUSY_S = 1
"""`Retry-After` of a request that is one too many."""


class Limits:
    """Guards an app.

    Args:
        app: the app.
        open_paths: paths that need no key and do not count: probes and metrics.
        keys: the API keys.
        max_body_bytes: the largest body.
        max_requests: requests that may run at once; None for no limit.
    """

    def __init__(
        self, app: ASGIApp, open_paths: Container[str], keys: Keys, max_body_bytes: int, max_requests: int | None
    ) -> None:
        self._app, self._open_paths, self._keys = app, open_paths, keys
        self._max_body_bytes, self._max_requests = max_body_bytes, max_requests
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request of ASGI."""
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        size, key, length = 0, b"", b"0"
        for name, value in scope["headers"]:
            size += len(name) + len(value)
            if name == b"authorization":
                key = value
            elif name == b"content-length":
                length = value
        if size > MAX_HEAD_BYTES:
            text = f"The headers have more than {MAX_HEAD_BYTES:,} bytes."
            await refuse(scope, send, 431, "headers_too_large", text)
        elif not self._keys.allow(key):
            text = "The API key is missing or wrong. Send it as: Authorization: Bearer KEY"
            await refuse(scope, send, 401, "invalid_api_key", text, _BEARER)
        elif int(length) > self._max_body_bytes:  # The server has refused a length that is not a number.
            text = f"The body has {int(length):,} bytes, above the limit of {self._max_body_bytes:,}."
            # The connection stays: the server reads the rest of the body and drops it. A client that still writes would
            # lose the answer if the connection were closed.
            await refuse(scope, send, 413, "request_too_large", text)
        elif self._max_requests is not None and self.running >= self._max_requests:
            await refuse(scope, send, 503, "overloaded", "The server is at capacity. Try again later.", _LATER)
        else:
            self.running += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self.running -= 1


_BEARER = ((b"www-authenticate", b"Bearer"),)
_LATER = ((b"retry-after", b"%d" % BUSY_S), (b"retry-after-ms", b"%d" % (BUSY_S * 1000)))
_TYPES = {401: "authentication_error", 503: "overloaded_error"}


async def refuse(
    scope: Scope, send: Send, status: int, code: str, text: str, headers: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    """Answer with an error: in the form of the OpenAI API below `/v1`, elsewhere as in RFC 9457."""
    if scope["path"].startswith("/v1/"):
        kind = b"application/json"
        error = {"message": text, "type": _TYPES.get(status, "invalid_request_error"), "param": None, "code": code}
        body = msgspec.json.encode({"error": error})
    else:
        kind = b"application/problem+json"
        body = msgspec.json.encode({"status": status, "code": code, "detail": text})
    found = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": found})
    await send({"type": "http.response.body", "body": body})
