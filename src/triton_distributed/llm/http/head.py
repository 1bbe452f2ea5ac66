"""The headers of a request, read once. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable

from triton_distributed.integrations.http.request import REQUEST_ID, read_headers


class Head:
    """What is needed of the headers of a request.

    Attributes:
        id: the id of the request, from `x-request-id`, or a random one.
        travelling: the trace context and the baggage, for the calls to workers.
        authorization: the value of that header; empty without it.
        length: the length of the body in bytes; 0 if it is not known.
        size: of all names and values in bytes.
        session: the value of `x-session-id`; empty without it.
        explain: the value of `x-trd-explain`; empty without it.
        expects: whether the client waits for a word before it sends the body.
    """

    __slots__ = ("authorization", "expects", "explain", "id", "length", "session", "size", "travelling")

    def __init__(self, id: str, travelling: dict[str, str]) -> None:
        self.id, self.travelling = id, travelling
        self.authorization = self.session = self.explain = b""
        self.length = self.size = 0
        self.expects = False


class Reader:
    """Collects the head of a request for the parser of HTTP, which calls it for each header.

    Args:
        begin, head, body, end: called at these places of a request.

    Attributes:
        url: the target of the request.
        headers: the names, in lower case, with their values.
    """

    def __init__(
        self,
        begin: Callable[[], None],
        head: Callable[[], None],
        body: Callable[[bytes], None],
        end: Callable[[], None],
    ) -> None:
        self._begin = begin
        self.on_headers_complete, self.on_body, self.on_message_complete = head, body, end
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []

    def on_message_begin(self) -> None:
        """A request begins."""
        self.url, self.headers = b"", []
        self._begin()

    def on_url(self, url: bytes) -> None:
        """A part of the target has come."""
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header has come."""
        self.headers.append((name.lower(), value))


SESSION = b"x-session-id"
EXPLAIN = b"x-trd-explain"

_OWN = {REQUEST_ID, b"traceparent", b"tracestate", b"baggage"}


def read_head(headers: list[tuple[bytes, bytes]]) -> Head:
    """Read the headers, whose names are in lower case."""
    found, size, own = Head("", {}), 0, False
    for name, value in headers:
        size += len(name) + len(value)
        if name == b"content-length":
            found.length = int(value)  # The server has refused a length that is not a number.
        elif name == b"authorization":
            found.authorization = value
        elif name in _OWN:
            own = True
        elif name == SESSION:
            found.session = value
        elif name == EXPLAIN:
            found.explain = value
        elif name == b"expect":
            found.expects = True
    found.size = size
    if own:
        found.id, found.travelling = read_headers(headers)
    else:
        found.id = f"{random.getrandbits(128):032x}"
    return found
