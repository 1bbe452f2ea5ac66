"""The headers of a request, read once. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

from triton_distributed.integrations.http.request import REQUEST_ID, read_headers


class Head(NamedTuple):
    """What the front end needs of the headers of a request.

    Attributes:
        id: the id of the request, from `x-request-id`, or a random one.
        travelling: the trace context and the baggage, for the calls to workers.
        authorization: the value of that header; empty without it.
        length: the length of the body in bytes; 0 if it is not known.
        size: of all names and values in bytes.
    """

    id: str
    travelling: dict[str, str]
    authorization: bytes
    length: int
    size: int


_OWN = {REQUEST_ID, b"traceparent", b"tracestate", b"baggage"}


def read_head(headers: Iterable[tuple[bytes, bytes]]) -> Head:
    """Read the headers, whose names are in lower case."""
    key, length, size, own = b"", 0, 0, False
    for name, value in headers:
        size += len(name) + len(value)
        if name == b"content-length":
            length = int(value)  # The server has refused a length that is not a number.
        elif name == b"authorization":
            key = value
        elif name in _OWN:
            own = True
    if own:
        id, travelling = read_headers(headers)
    else:
        id, travelling = f"{random.getrandbits(128):032x}", {}
    return Head(id, travelling, key, length, size)
