"""Received bytes become the same frames whatever pieces they come in."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.joined import three_ways
from triton_distributed.wire import frames as f
from triton_distributed.wire.decoder import FrameDecoder

some_frames = st.lists(
    st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(0, 2**64 - 1), st.binary(max_size=200)), max_size=8
)


def encoded(frames) -> bytes:
    return b"".join(f.frame(kind, stream, payload, flags) for kind, flags, stream, payload in frames)


def decoded(pieces):
    decoder = FrameDecoder()
    return [frame for piece in pieces for frame in decoder.feed(piece)], decoder


@given(some_frames)
def test_frames_come_out_as_they_went_in(frames):
    for _, pieces in three_ways(encoded(frames)):
        found, decoder = decoded(pieces)
        assert found == frames
        assert decoder.failure is None


@given(some_frames, st.data())
def test_any_cut_gives_the_same(frames, data):
    stream = encoded(frames) + data.draw(st.binary(max_size=40))
    whole, one = decoded([stream])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    bounds = [0, *cuts, len(stream)]
    pieces, other = decoded([stream[a:b] for a, b in itertools.pairwise(bounds)])
    assert pieces == whole
    assert (one.failure, one.partial) == (other.failure, other.partial)


@given(some_frames, st.data())
def test_a_few_at_a_time_gives_the_same(frames, data):
    stream = encoded(frames) + data.draw(st.binary(max_size=40))
    whole, one = decoded([stream])
    other, found = FrameDecoder(), []
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    for a, b in itertools.pairwise([0, *cuts, len(stream)]):
        found += other.feed(stream[a:b], data.draw(st.integers(0, 3)))
        assert other.failure is None or not other.more
    while other.more:
        found += other.feed(b"", data.draw(st.integers(1, 3)))
    found += other.feed(b"")
    assert found == whole
    assert (one.failure, one.partial) == (other.failure, other.partial)


def test_what_is_left_of_a_large_read_is_not_copied_for_each_few_frames():
    decoder = FrameDecoder()
    read = f.frame(f.HELLO, 0) + f.frame(f.PING, 0) * 1000
    decoder.feed(read, 1)
    for _ in range(100):
        assert decoder.feed(b"", 8) == [(f.PING, 0, 0, b"")] * 8
        assert decoder._parts[0] is read


@pytest.mark.parametrize("size", [f.MAX_HELLO + 1, 2**31, 2**32 - 1])
def test_a_first_frame_above_a_hello_is_another_protocol(size):
    for _, pieces in three_ways(f.HEADER.pack(size, 1, 0, 0) + bytes(50)):
        found, decoder = decoded(pieces)
        assert found == []
        assert "not this protocol" in decoder.failure
        assert f"{size:,}" in decoder.failure


def test_a_first_line_of_http_is_another_protocol():
    for _, pieces in three_ways(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        assert "not this protocol" in decoded(pieces)[1].failure


@pytest.mark.parametrize("size", [f.MAX_HELLO + 1, f.MAX_FRAME])
def test_a_large_frame_right_behind_the_hello_is_taken(size):
    stream = f.frame(f.HELLO, 0, b"x") + f.frame(f.REQUEST, 1, bytes(size))
    assert [len(frame[3]) for frame in decoded([stream])[0]] == [1, size]
    assert [len(frame[3]) for frame in decoded([stream[:20], stream[20:]])[0]] == [1, size]


def test_a_frame_above_the_limit_names_it_and_nothing_more_is_read():
    good = f.frame(f.HELLO, 0, b"x")
    found, decoder = decoded([good + f.HEADER.pack(f.MAX_FRAME + 1, f.DATA, 0, 1), good])
    assert found == [(f.HELLO, 0, 0, b"x")]
    assert "kind 3 announces 262,145 bytes, the limit is 262,144" in decoder.failure


def test_small_pieces_are_joined_once():
    decoder = FrameDecoder()
    decoder.feed(f.frame(f.HELLO, 0))
    stream = f.frame(f.DATA, 1, bytes(f.MAX_FRAME))
    pieces = [stream[at : at + 64] for at in range(0, len(stream), 64)]
    found = [frame for piece in pieces for frame in decoder.feed(piece)]
    assert found == [(f.DATA, 0, 1, bytes(f.MAX_FRAME))]
    assert decoder.partial is None


def after_a_hello(largest: int) -> FrameDecoder:
    decoder = FrameDecoder()
    decoder.largest = largest
    decoder.feed(f.frame(f.HELLO, 0))
    return decoder


def test_a_large_frame_is_left_to_the_caller_even_if_it_is_complete():
    payload = bytes(range(256)) * 2000
    decoder = after_a_hello(len(payload))
    assert decoder.feed(f.frame(f.PING, 0) + f.frame(f.DATA, 1, payload) + f.frame(f.PONG, 0)) == [(f.PING, 0, 0, b"")]
    assert decoder.partial == (f.DATA, 0, 1, len(payload))
    data = decoder.take_partial()
    assert data[: len(payload)] == payload
    decoder.give_back(data[len(payload) :])
    assert decoder.more
    assert decoder.feed(b"") == [(f.PONG, 0, 0, b"")]


@pytest.mark.parametrize(
    ("kind", "size", "limit"),
    [(f.DATA, 500_001, "500,000"), (f.BATCH, 300_000, "262,144"), (f.REQUEST, 300_000, "262,144")],
)
def test_a_large_frame_that_may_not_come(kind, size, limit):
    decoder = after_a_hello(500_000)
    assert decoder.feed(f.HEADER.pack(size, kind, 0, 1)) == []
    assert decoder.failure is not None
    assert f"kind {kind} announces {size:,} bytes, the limit is {limit}" in str(decoder.failure)


def test_no_large_frame_comes_before_the_hello():
    decoder = FrameDecoder()
    decoder.largest = f.LARGE_FRAME
    decoder.feed(f.HEADER.pack(f.LARGE_FRAME, f.DATA, 0, 1))
    assert "a hello has at most 4,096" in str(decoder.failure)


def test_what_is_here_of_a_payload_can_be_taken():
    decoder = FrameDecoder()
    decoder.feed(f.frame(f.HELLO, 0))
    stream = f.frame(f.DATA, 1, b"0123456789")
    assert decoder.feed(stream[:18]) == []
    assert decoder.partial == (f.DATA, 0, 1, 10)
    assert decoder.take_partial() == b"0123"
    assert decoder.feed(f.frame(f.PING, 0, b"next")) == [(f.PING, 0, 0, b"next")]
