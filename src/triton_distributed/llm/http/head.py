"""The headers of a request, read once. Pure."""

from __future__ import annotations

import random

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
    """

    __slots__ = ("authorization", "explain", "id", "length", "session", "size", "travelling")

    def __init__(self, id: str, travelling: dict[str, str]) -> None:
        self.id, self.travelling = id, travelling
        self.authorization = self.session = self.explain = b""
        self.length = self.size = 0


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
    found.size = size
    if own:
        found.id, found.travelling = read_headers(headers)
    else:
        found.id = f"{random.getrandbits(128):032x}"
    return found
