"""HTTP/1.1 as the status port speaks it: bytes to requests, responses to bytes. No I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

HEAD_BYTES = 16 * 1024
"""Most bytes of a request's first line and headers. Probes and scrapes need a few hundred."""

BODY_BYTES = 1024 * 1024
"""Most bytes of a request's body."""

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) ([!-~]+) HTTP/1\.([01])")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*?)[ \t]*")
_LENGTH = re.compile(r"[0-9]{1,12}")


class BadRequest(Exception):
    """A request cannot be answered, and its connection ends.

    Attributes:
        status: the status of the response.
        reason: what is wrong, for people.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Request(NamedTuple):
    """One request.

    Attributes:
        method: the method; HEAD is GET, since the server leaves the body out.
        path: the decoded path.
        query: the parameters of the query; of a repeated one, the last.
        headers: the headers, their names in lower case; of a repeated one, the last.
        body: the body.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b""


class Response(NamedTuple):
    """One response.

    Attributes:
        status: the status code.
        body: the body.
        content_type: the media type of the body.
        headers: further headers.
    """

    status: int
    body: bytes
    content_type: str = JSON
    headers: Mapping[str, str] = {}


class Head(NamedTuple):
    """A request without its body.

    Attributes:
        request: the request, with an empty body.
        wants_body: False for HEAD, whose response has no body.
        length: bytes of the body that follows.
        expects: the client waits for `CONTINUE` before it sends the body.
        closes: the connection ends after the response.
    """

    request: Request
    wants_body: bool
    length: int
    expects: bool
    closes: bool


def parse_head(data: bytes) -> Head:
    """Parse the first line and the headers of a request.

    Args:
        data: all bytes before the empty line.

    Raises:
        BadRequest: they are not valid HTTP/1.0 or 1.1, or the body is too large or of unknown length.
    """
    first, *lines = data.split(b"\r\n")
    found = _REQUEST_LINE.fullmatch(first)
    if found is None:
        raise BadRequest(400, "the first line is not `METHOD /path HTTP/1.1`")
    headers: dict[str, str] = {}
    for line in lines:
        header = _HEADER.fullmatch(line)
        if header is None:
            raise BadRequest(400, "a header is not `Name: value`")
        name, value = header[1].decode().lower(), header[2].decode("latin-1")
        if name in ("host", "content-length") and headers.get(name, value) != value:
            raise BadRequest(400, f"there are two different headers {name}")
        headers[name] = value
    method, new = found[1].decode(), found[3] == b"1"
    if new and "host" not in headers:
        raise BadRequest(400, "the header Host is missing")
    path, query = _target(found[2].decode())
    return Head(
        request=Request("GET" if method == "HEAD" else method, path, query, headers),
        wants_body=method != "HEAD",
        length=_body_length(headers),
        expects=new and headers.get("expect", "").lower() == "100-continue",
        closes=not new or "close" in [each.strip() for each in headers.get("connection", "").lower().split(",")],
    )


def _target(text: str) -> tuple[str, dict[str, str]]:
    """The path and the query of a request's target, which is a path or a whole URL."""
    try:
        parts = urlsplit(text if "://" in text.partition("?")[0] else "//host" + text)
        query = dict(parse_qsl(parts.query, keep_blank_values=True, max_num_fields=100))
    except ValueError as error:
        raise BadRequest(400, f"the path cannot be read: {error}") from None
    if not parts.path.startswith("/"):
        raise BadRequest(400, "the path does not begin with /")
    return unquote(parts.path), query


def _body_length(headers: Mapping[str, str]) -> int:
    if "transfer-encoding" in headers:
        raise BadRequest(501, "send the body with Content-Length: there is no Transfer-Encoding here")
    text = headers.get("content-length", "0")
    if not _LENGTH.fullmatch(text):
        raise BadRequest(400, "Content-Length is not a number of bytes")
    if (length := int(text)) > BODY_BYTES:
        raise BadRequest(413, f"the body has {length:,} bytes, above the limit of {BODY_BYTES:,}")
    return length


def written(response: Response, wants_body: bool, closes: bool) -> bytes:
    """The bytes of a response.

    Args:
        wants_body: False to send the headers alone.
        closes: the connection ends after the response.
    """
    headers = {
        "Content-Type": response.content_type,
        "Content-Length": str(len(response.body)),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        **response.headers,
        **({"Connection": "close"} if closes else {}),
    }
    lines = [f"HTTP/1.1 {response.status} {_phrase(response.status)}", *(f"{n}: {v}" for n, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (response.body if wants_body else b"")


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response with a JSON value, which ends with a new line so that it reads well in a terminal.

    Raises:
        TypeError, ValueError: the value cannot be encoded.
    """
    return Response(status, msgspec.json.encode(value) + b"\n", JSON, headers or {})


def error_response(status: int, reason: str, headers: Mapping[str, str] | None = None) -> Response:
    """A response that says in JSON what is wrong."""
    return json_response({"error": reason}, status, headers)
