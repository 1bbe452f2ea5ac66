"""Invariant: the status port's parser takes a head or refuses it with an error's status, and raises nothing else.

What it takes has a path from the root, and a body within the limit; the answer to it can be written.
"""

from __future__ import annotations

from triton_distributed.status.http import BODY_BYTES, BadRequest, error_response, parse_head, written

SEEDS = [
    b"GET /statistics/history?since=1.5&x=%41 HTTP/1.1\r\nHost: localhost:9090\r\nAccept: */*",
    b"POST /sleep HTTP/1.1\r\nHost: [::1]:9090\r\nContent-Length: 12\r\nExpect: 100-continue\r\nConnection: close",
    b"HEAD http://host:1/live HTTP/1.0",
]


def one_input(data: bytes) -> None:
    try:
        head = parse_head(data)
    except BadRequest as error:
        assert 400 <= error.status <= 599
        written(error_response(error.status, error.reason), True, True)
        return
    assert head.request.path.startswith("/")
    assert 0 <= head.length <= BODY_BYTES
    assert written(error_response(404, head.request.path), head.wants_body, head.closes).startswith(b"HTTP/1.1 404 ")
