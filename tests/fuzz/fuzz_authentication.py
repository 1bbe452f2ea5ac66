"""Invariant: who does not know the token gets nothing from a worker but its challenge: no request is served, nothing is
kept beyond two small frames, and only RemoteProtocolError comes out, whichever way the bytes are cut.

The first byte of an input decides where it is cut; the rest is what the network brings. The proof is right in one seed,
and a mutation of what stands behind it may ask for what any member may.
"""

from __future__ import annotations

from triton_distributed.errors import RemoteProtocolError
from triton_distributed.wire import frames as f
from triton_distributed.wire.authentication import PROOF_BYTES, REFUSED, Authentication
from triton_distributed.wire.connection import Connection, Shell
from triton_distributed.wire.hello import Hello, hello_frame, hello_payload
from triton_distributed.wire.stream import StreamCore

TOKEN = b"a token"
OF_CLIENT, OF_WORKER = b"c" * 32, b"w" * 32
OPENING = hello_frame(Hello(features=["token"], challenge=OF_CLIENT))


class _Worker(Shell):
    served = 0

    def requested(self, stream: object, *request: object) -> None:
        self.served += 1

    def on_goaway(self, code: int, words: str) -> None:
        self.served += 1


def _proof(token: bytes) -> bytes:
    client = Authentication(token, OF_CLIENT, True)
    client.hear(Hello(features=["token"], challenge=OF_WORKER))
    return f.frame(f.AUTH, 0, client.prove(hello_payload(Hello(agent="it"))))


_REQUEST = f.frame(f.REQUEST, 1, f.REQUEST_PREFIX.pack(1, 2, 0.5, 65536, 0), f.END)
RIGHT = _proof(TOKEN)
SEEDS = [
    b"\x05" + OPENING + RIGHT + _REQUEST,
    b"\x05" + OPENING + _proof(b"wrong") + _REQUEST,
    b"\x05" + OPENING + f.coded(f.GOAWAY, 0, 0, b"bye"),
    b"\x05" + _REQUEST,
    b"\x05" + f.HEADER.pack(f.MAX_HELLO, f.HELLO, 0, 0) + bytes(100),
    b"\x05" + OPENING + f.HEADER.pack(f.MAX_HELLO, f.AUTH, 0, 0) + bytes(100),
]


def _end_of(pieces: list[bytes]) -> tuple[object, ...]:
    worker = _Worker()
    end = Connection(
        worker,
        StreamCore,
        Hello(window=65536, max_message=1 << 20),
        65536,
        1 << 20,
        Authentication(TOKEN, OF_WORKER, False),
    )
    end.on_request = worker.requested
    words = None
    try:
        for piece in pieces:
            end.receive(piece)
    except RemoteProtocolError as error:
        words = str(error)
    out = end.take_output()
    if end.peer is None:
        assert (worker.served, end.streams, out) == (0, {}, b"")
        assert words in (None, REFUSED) or "no common protocol version" in words
        assert sum(map(len, end._decoder._parts)) <= f.HEADER_BYTES + f.MAX_HELLO + max(map(len, pieces), default=0)
    else:
        whole = b"".join(pieces)
        assert RIGHT[f.HEADER_BYTES : f.HEADER_BYTES + PROOF_BYTES] in whole
    return words, worker.served, sorted(end.streams), out


def one_input(data: bytes) -> None:
    if not data:
        return
    step, stream = data[0] % 32 + 1, data[1:]
    whole = _end_of([stream])
    assert _end_of([stream[at : at + step] for at in range(0, len(stream), step)]) == whole
