"""Fragments above `MAX_FRAME`: who may send them, when, and what they cost a receiver."""

from __future__ import annotations

from collections import deque

import pytest

from tests.wire.joined import WINDOW, End, greeted, joined, opened, request
from triton_distributed.errors import RemoteProtocolError
from triton_distributed.wire import frames as f
from triton_distributed.wire.hello import Hello, hello_frame, read_hello
from triton_distributed.wire.pace import CALM, SMALLEST_FRAGMENT
from triton_distributed.wire.window import SLACK

LARGE = Hello(window=WINDOW, max_frame=f.LARGE_FRAME)
PLENTY = 1 << 40  # of credit


def client() -> End:
    return greeted(LARGE, peer=LARGE)


def message(size: int, *fragments: bytes) -> bytes:
    """A response of `size` bytes on stream 1, which goes on after these fragments."""
    start = f.frame(f.DATA, 1, f.UINT64.pack(size), f.MORE)
    return start + b"".join([f.frame(f.DATA, 1, each, f.MORE) for each in fragments])


# --- what a sender may do --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accepted", "largest"),
    [(f.MAX_FRAME, f.MAX_FRAME), (500_000, 500_000), (f.LARGE_FRAME, f.LARGE_FRAME), (1 << 40, f.LARGE_FRAME)],
)
def test_the_peers_hello_limits_the_fragments(accepted, largest):
    assert greeted(LARGE, peer=Hello(window=WINDOW, max_frame=accepted)).fragment_bytes(PLENTY) == largest


def test_a_peer_that_says_no_size_gets_frames_of_the_old_size():
    hello = read_hello(hello_frame(Hello(window=WINDOW))[f.HEADER_BYTES :])
    assert hello.max_frame == f.MAX_FRAME == 256 * 1024
    assert greeted(LARGE, peer=hello).fragment_bytes(PLENTY) == f.MAX_FRAME


def test_a_hello_must_accept_the_old_size():
    with pytest.raises(RemoteProtocolError, match="invalid limits"):
        read_hello(hello_frame(Hello(max_frame=f.MAX_FRAME - 1))[f.HEADER_BYTES :])


@pytest.mark.parametrize("credit", [1, f.MAX_FRAME, f.LARGE_FRAME - f.MAX_FRAME - 1])
def test_a_fragment_exceeds_the_credit_by_at_most_an_old_frame(credit):
    assert client().fragment_bytes(credit) == f.MAX_FRAME
    assert client().fragment_bytes(f.LARGE_FRAME - f.MAX_FRAME) == f.LARGE_FRAME


def grown(end: End) -> list[int]:
    """The sizes of the fragments until they are large again."""
    sizes: list[int] = []
    while not sizes or sizes[-1] < f.LARGE_FRAME:
        sizes.append(end.fragment_bytes(PLENTY))
    return sizes


def test_after_other_traffic_fragments_are_small_and_grow_with_the_bytes_that_leave():
    end = client()
    assert end.fragment_bytes(PLENTY) == f.LARGE_FRAME
    end.request(1, 2, 1.0, b"", b"small")
    sizes = grown(end)
    assert sizes[0] == SMALLEST_FRAGMENT
    assert sizes == sorted(sizes)
    assert sum(sizes[:-1]) >= CALM * f.LARGE_FRAME


def test_what_counts_as_other_traffic():
    mine, theirs = joined(hello=LARGE)

    def size(end: End) -> int:
        size = end.fragment_bytes(PLENTY)
        grown(end)
        return size

    stream, served = opened(mine, theirs, end=False)
    assert size(mine) == SMALLEST_FRAGMENT, "a request left"
    assert size(theirs) == SMALLEST_FRAGMENT, "a request came"
    assert size(mine) == size(theirs) == f.LARGE_FRAME
    served.push(b"item")
    theirs.take_some()
    assert size(theirs) == SMALLEST_FRAGMENT, "an item left"
    served.end()
    theirs.take_some()
    stream.ask_begun()
    mine.take_some()
    assert size(mine) == size(theirs) == f.LARGE_FRAME, "an end and a question are not items"


def test_large_requests_do_not_make_each_other_small():
    server = greeted(LARGE, peer=LARGE)
    for number in range(1, 9):
        server.receive(f.frame(f.REQUEST, number, f.UINT64.pack(f.LARGE_FRAME) + b"x", f.MORE))
    assert server.fragment_bytes(PLENTY) == f.LARGE_FRAME
    assert server.calm
    server.receive(request(9))
    assert not server.calm


# --- what a receiver takes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("step", [100_000, f.LARGE_FRAME + 7, 1 << 24])
def test_large_fragments_arrive_and_what_follows_them_is_read(step, in_place):
    end = client()
    stream = end.open_stream(True)
    other = end.open_stream(True)
    pieces = [bytes([number]) * f.LARGE_FRAME for number in range(3)]
    data = message(sum(map(len, pieces)) + 5, pieces[0], pieces[1]) + f.frame(f.DATA, other.id, b"between", f.END)
    data += f.frame(f.DATA, 1, pieces[2], f.MORE) + f.frame(f.DATA, 1, b"right", f.END) + f.frame(f.PING, 0, b"after")
    for at in range(0, len(data), step):
        end.take(data[at : at + step], in_place)
    assert bytes(stream.inbox.pop()[3]) == b"".join(pieces) + b"right"
    assert other.inbox.pop()[3] == b"between"
    assert end.written()[-1] == (f.PONG, 0, 0, b"after")


BROKEN = [
    pytest.param(f.HEADER.pack(f.LARGE_FRAME, f.DATA, 0, 1), "does not continue a message", id="an item of its own"),
    pytest.param(f.HEADER.pack(f.LARGE_FRAME, f.DATA, f.MORE, 1), "does not continue", id="the start of a message"),
    pytest.param(
        message(f.LARGE_FRAME - 1) + f.HEADER.pack(f.LARGE_FRAME, f.DATA, f.MORE, 1), "does not continue", id="too long"
    ),
    pytest.param(
        message(PLENTY >> 11) + f.HEADER.pack(f.LARGE_FRAME, f.DATA, f.MORE | f.END, 1), "does not", id="goes on, ends"
    ),
    pytest.param(
        message(PLENTY >> 11) + f.HEADER.pack(f.LARGE_FRAME + 1, f.DATA, f.MORE, 1),
        "the limit is 1,048,576",
        id="above",
    ),
    pytest.param(f.HEADER.pack(f.LARGE_FRAME, f.DATA, 0, 9), "stream 9, which was never opened", id="from nowhere"),
    pytest.param(f.HEADER.pack(f.LARGE_FRAME, f.PONG, 0, 0), "kind 13 announces .* 262,144", id="another kind"),
]


@pytest.mark.parametrize(("data", "says"), BROKEN)
@pytest.mark.parametrize("payload", [0, 100, f.LARGE_FRAME])
def test_large_frames_that_are_refused_by_their_header(data, says, payload):
    end = client()
    end.open_stream(True)
    with pytest.raises(RemoteProtocolError, match=says):
        end.take(data + bytes(payload))


def test_a_fragment_above_the_credit_is_refused_before_it_comes():
    """A message that has no credit as a whole: another one waits before it."""
    end = client()
    stream = end.open_stream(True)
    stream.inbox = deque([(0, f.DATA, 0, b"unread", None)])
    end.take(message(PLENTY >> 11, bytes(WINDOW + SLACK - 100_000)))
    with pytest.raises(RemoteProtocolError, match="above its credit"):
        end.take(f.HEADER.pack(f.LARGE_FRAME, f.DATA, f.MORE, 1))


@pytest.mark.parametrize("in_place", [True, False])
def test_a_fragment_of_a_stream_that_has_ended_is_dropped_and_takes_no_memory(in_place):
    end = client()
    end.open_stream(True).abort(f.CANCEL)
    data = f.HEADER.pack(f.LARGE_FRAME, f.DATA, f.MORE, 1) + bytes(f.LARGE_FRAME) + f.frame(f.PING, 0, b"after")
    most = 0
    for at in range(0, len(data), 50_000):
        end.take(data[at : at + 50_000], in_place)
        most = max(most, sum(map(len, end._decoder._parts)))
    assert most < f.HEADER_BYTES + 4
    assert end.written()[-1] == (f.PONG, 0, 0, b"after")
