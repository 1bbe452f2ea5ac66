"""Invariant: whatever a peer says after its hello, only RemoteProtocolError comes out, both ways of cutting it end alike,
and memory stays within what arrived and what a stream's window costs.

The first byte of an input decides where it is cut and whether this end has streams of its own; the rest is what the
network brings.
"""

from __future__ import annotations

from triton_distributed.errors import RemoteProtocolError
from triton_distributed.wire import frames as f
from triton_distributed.wire.connection import OVER, Connection
from triton_distributed.wire.hello import Hello, hello_frame
from triton_distributed.wire.stream import StreamCore

HELLO = hello_frame(Hello(window=65536, features=["load"]))
LIMIT = 1 << 20  # bytes of a message, so that what is announced can also be sent


class _End(Connection[StreamCore]):
    def _requested(self, stream: object, *request: object) -> None:
        self.requests += 1

    def _asks(self, connection: object, keys: list[int]) -> None:
        self.asked += len(keys)
        self.report_load([(key, 1, 2) for key in keys[:1]])

    def _heard(self, running: int, waiting: int) -> None:
        self.loads += 1

    requests = asked = loads = 0


def _request(number: int, flags: int, body: bytes = b"") -> bytes:
    return f.frame(f.REQUEST, number, f.REQUEST_PREFIX.pack(1, 2, float("inf"), 65536, 0) + body, flags)


def _said(*frames: bytes, own: bool = False) -> bytes:
    return (b"\x85" if own else b"\x05") + b"".join(frames)


_HEAD = (1).to_bytes(4, "little") + (2).to_bytes(4, "little") + f.UINT64.pack(3)

SEEDS = [
    _said(_request(1, f.END), f.frame(f.CANCEL, 1), _request(2, 0), f.frame(f.DATA, 2, b"\x01", f.END)),
    _said(
        _request(1, 0), f.frame(f.BATCH, 1, b"\x92\x01\x02"), f.frame(f.CREDIT, 1, bytes(4)), f.frame(5, 1, b"", f.END)
    ),
    _said(_request(3, 0), f.frame(f.DATA, 3, f.UINT64.pack(30) + bytes(10), f.MORE), f.frame(f.DATA, 3, bytes(20))),
    _said(f.frame(f.REQUEST, 1, f.UINT64.pack(40) + bytes(30), f.MORE), f.frame(f.DATA, 1, bytes(10), f.END)),
    _said(_request(1, 0), f.frame(f.DATA, 1, _HEAD + b"abcde", f.BUFFERS)),
    _said(f.frame(f.DATA, 1, b"\x01"), f.frame(f.DATA, 2, b"\x01", f.END), own=True),
    _said(
        f.frame(f.ACCEPT, 0, f.UINT64.pack(1)),
        f.frame(f.ACCEPT, 1),
        f.coded(f.ERROR, 1, 0, b"x"),
        f.coded(f.REJECT, 2, 0, b"x"),
        own=True,
    ),
    _said(
        f.frame(f.DATA, 1, f.UINT64.pack(40_000) + b"a", f.MORE), f.HEADER.pack(39_000, 3, 0, 1) + bytes(200), own=True
    ),
    _said(f.frame(f.PING, 0, b"12345678"), f.frame(f.PONG, 0, b"1"), f.coded(f.GOAWAY, 0, 0, b"bye")),
    _said(f.frame(f.ASK, 0, f.UINT64.pack(7) * 3), f.frame(f.ASK, 0, bytes(8))),
    _said(f.frame(f.LOAD, 0, f.LOAD_ENTRY.pack(7, 1, 2) * 2), f.frame(f.LOAD, 0, bytes(16)), own=True),
    _said(HELLO),
]


def _taken(end: _End, data: bytes) -> None:
    """Receive as the shell does: what belongs into a message under way is written there."""
    end.receive(end.copy_direct(data))


def _end_of(pieces: list[bytes], own: bool) -> tuple[object, ...]:
    end = _End(OVER, StreamCore, Hello(window=65536, max_message=LIMIT, max_streams=16), 65536, 1 << 20)
    end.on_request = end._requested
    end.receive(HELLO)
    if own:
        for ends in (True, False):
            end.open_stream(ends)
        end.ask_load(7, end._heard)
    else:
        end.on_ask = end._asks
    words = None
    try:
        for piece in pieces:
            _taken(end, piece)
    except RemoteProtocolError as error:
        words = str(error)
    arrived = sum(map(len, pieces))
    assert len(end.streams) <= 16 + 1
    for stream in end.streams.values():
        held = sum(len(body) + sum(map(len, buffers or ())) for _, _, _, body, buffers in stream.inbox)
        assert held <= arrived
        if stream.assembly is not None:
            assert stream.assembly.left <= LIMIT
    assert sum(map(len, end.out)) <= 256 * (
        arrived // f.HEADER_BYTES + 1
    )  # an answer to a frame at most, and it is short
    return words, end.requests, end.asked, end.loads, sorted(end.streams), end.going, end.take_output()


def one_input(data: bytes) -> None:
    if not data:
        return
    step, own, stream = data[0] % 32 + 1, data[0] >= 128, data[1:]
    whole = _end_of([stream], own)
    assert _end_of([stream[at : at + step] for at in range(0, len(stream), step)], own) == whole
