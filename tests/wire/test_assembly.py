"""Messages in fragments, and heads that lie."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_distributed.errors import RemoteProtocolError
from triton_distributed.wire import frames as f
from triton_distributed.wire.assembly import (
    MAX_BUFFERS,
    MOST_LENT,
    Assembly,
    allocate,
    decline,
    fragments,
    head_of,
    message_bytes,
)

LIMIT = 1 << 30
EDGES = [0, 1, f.SMALL - 1, f.SMALL, f.SMALL + 1, f.MAX_FRAME - 8, f.MAX_FRAME, f.MAX_FRAME + 1, 3 * f.MAX_FRAME]


def pattern(size: int, seed: int = 0) -> bytes:
    return (bytes((each + seed) % 251 for each in range(1021)) * (size // 1021 + 1))[:size]


def put_together(pieces, limit=LIMIT):
    """Fragments through an Assembly; checks what every sender must keep."""
    pieces = list(pieces)
    flags, start, rest = pieces[0]
    first = start + rest
    assert all(len(start) + rest.nbytes <= f.MAX_FRAME for _, start, rest in pieces)
    assert [bool(flags & f.MORE) for flags, _, _ in pieces] == [True] * (len(pieces) - 1) + [False]
    if not flags & (f.MORE | f.BUFFERS):  # a frame of its own needs no assembly
        return bytes(first), []
    assembly = Assembly(f.DATA, flags, first, limit)
    for _, start, rest in pieces[1:]:
        assembly.write(memoryview(start + rest))
    body, buffers = assembly.finish()
    return bytes(body), [bytes(each) for each in buffers]


def cut(body: bytes, *buffers: bytes, flags: int = 0):
    return fragments(body, [memoryview(each) for each in buffers], flags, lambda: f.MAX_FRAME)


@pytest.mark.parametrize("size", EDGES)
def test_a_body_of_any_size(size):
    pieces = [*cut(pattern(size), flags=f.END)]
    assert [flags & f.END for flags, _, _ in pieces] == [0] * (len(pieces) - 1) + [f.END]
    assert put_together(pieces) == (pattern(size), [])


@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("body", [0, 5, f.MAX_FRAME])
def test_a_buffer_of_any_size(size, body):
    assert put_together(cut(pattern(body), pattern(size, 7))) == (pattern(body), [pattern(size, 7)])


@given(st.sampled_from(EDGES), st.lists(st.one_of(st.sampled_from(EDGES), st.integers(0, 5000)), max_size=6))
def test_any_message(body, sizes):
    buffers = [pattern(size, number) for number, size in enumerate(sizes)]
    assert put_together(cut(pattern(body), *buffers)) == (pattern(body), buffers)


@pytest.mark.parametrize("number", [1, 3000, 10_000, MAX_BUFFERS])
def test_buffers_without_a_byte(number):
    body, buffers = put_together(cut(b"body", *[b""] * number))
    assert body == b"body"
    assert buffers == [b""] * number


def test_thousands_of_buffers():
    buffers = [pattern(number % 300, number) for number in range(2000)]
    assert put_together(cut(b"", *buffers)) == (b"", buffers)


def test_more_buffers_than_a_head_can_name():
    with pytest.raises(ValueError, match=f"at most {MAX_BUFFERS:,} .* not {MAX_BUFFERS + 1:,}"):
        [*cut(b"", *[b""] * (MAX_BUFFERS + 1))]


@pytest.mark.parametrize("flags", [f.ANNOTATED, f.ANNOTATED | f.END])
def test_flags_are_those_of_the_last_fragment(flags):
    pieces = [*cut(b"", pattern(f.MAX_FRAME * 2), flags=flags)]
    assert pieces[-1][0] == flags | f.BUFFERS
    assert all(each[0] == f.MORE | f.BUFFERS for each in pieces[:-1])


def test_what_counts_against_the_limit_is_the_same_at_both_ends():
    buffers = [bytes(5), bytes(100_000)]
    size = message_bytes(20, [memoryview(each) for each in buffers])
    put_together(cut(bytes(20), *buffers), limit=size)
    with pytest.raises(RemoteProtocolError, match="the limit is"):
        put_together(cut(bytes(20), *buffers), limit=size - 1)


def head(*sizes: int, body: int = 0, number: int | None = None) -> bytes:
    return struct.pack("<II", len(sizes) if number is None else number, body) + b"".join(
        each.to_bytes(8, "little") for each in sizes
    )


def total(size: int) -> bytes:
    return size.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("flags", "first", "says"),
    [
        pytest.param(f.MORE, b"", "begins without its length", id="nothing at all"),
        pytest.param(f.MORE, bytes(7), "begins without its length", id="half a length"),
        pytest.param(f.MORE, total(LIMIT + 1), "the limit is 1,073,741,824", id="above the limit"),
        pytest.param(f.MORE, total(2**64 - 1), "the limit is 1,073,741,824", id="as large as can be said"),
        pytest.param(f.MORE, total(3) + b"1234", "longer than it announced", id="first fragment too long"),
        pytest.param(f.BUFFERS, b"", "without its head", id="no head"),
        pytest.param(f.BUFFERS, bytes(7), "without its head", id="half a head"),
        pytest.param(f.BUFFERS, head(number=1), "cut short", id="head without sizes"),
        pytest.param(f.BUFFERS, head(number=2**32 - 1), "4,294,967,295 buffers", id="as many as can be said"),
        pytest.param(f.BUFFERS, head(number=MAX_BUFFERS + 1), "cut short", id="one too many"),
        pytest.param(f.BUFFERS, head(5), "do not add up", id="a buffer that is not there"),
        pytest.param(f.BUFFERS, head(body=5), "do not add up", id="a body that is not there"),
        pytest.param(f.BUFFERS, head() + b"x", "do not add up", id="bytes that belong nowhere"),
        pytest.param(f.BUFFERS, head(2**64 - 1, 2**64 - 1), "do not add up", id="sizes that overflow"),
        pytest.param(f.BUFFERS, head(2**64 - 16) + b"", "do not add up", id="a size that would wrap"),
        pytest.param(f.MORE | f.BUFFERS, total(10), "without its head", id="fragmented, no head"),
        pytest.param(f.MORE | f.BUFFERS, total(10) + head(5), "do not add up", id="fragmented, sizes and total differ"),
        pytest.param(f.MORE | f.BUFFERS, total(2**30) + head(2**63), "do not add up", id="fragmented, huge buffer"),
        pytest.param(f.MORE | f.BUFFERS, total(0) + head(), "do not add up", id="a total below the head"),
    ],
)
def test_heads_that_lie(flags, first, says):
    with pytest.raises(RemoteProtocolError, match=says):
        Assembly(f.DATA, flags, first, LIMIT)


@given(st.integers(0, 15), st.binary(max_size=64))
def test_any_first_fragment_is_taken_or_refused(flags, first):
    try:
        assembly = Assembly(f.DATA, flags, first, 1 << 20)
    except RemoteProtocolError:
        return
    assert assembly.left >= 0
    assert assembly.target(1 << 30).nbytes <= assembly.left


@pytest.mark.parametrize("more", [0, 1])
def test_a_message_lends_so_many_buffers_at_most(more):
    """Borrowing 10,000 would stop the receiver's loop for seconds."""
    borrowed: list[int] = []

    def borrow(segment: int, offset: int, size: int) -> memoryview:
        borrowed.append(offset)
        return memoryview(bytes(size))

    lent = [memoryview(b"1")] * (MOST_LENT + more)
    first = head_of(0, lent, [(1, at) for at in range(len(lent))])
    flags = f.BUFFERS | f.LENT
    if not more:
        decline(flags, first, borrow)
        assert len(Assembly(f.DATA, flags, first, LIMIT, borrow).finish()[1]) == MOST_LENT
        assert borrowed == [*range(MOST_LENT)] * 2
        return
    with pytest.raises(RemoteProtocolError, match="257 buffers, the limit is 256"):
        decline(flags, first, borrow)
    with pytest.raises(RemoteProtocolError, match="257 buffers, the limit is 256"):
        Assembly(f.DATA, flags, first, LIMIT, borrow)
    assert not borrowed


def test_fragments_that_go_on_too_long():
    assembly = Assembly(f.DATA, f.MORE, total(10) + b"12345", LIMIT)
    with pytest.raises(RemoteProtocolError, match="longer than it announced"):
        assembly.write(memoryview(b"678901"))


def test_a_last_fragment_that_leaves_bytes_missing():
    assembly = Assembly(f.DATA, f.MORE, total(10) + b"12345", LIMIT)
    with pytest.raises(RemoteProtocolError, match="5 announced bytes missing"):
        assembly.finish()


def test_bytes_are_written_where_they_belong_one_at_a_time():
    data = head(3, 0, 2, body=1) + b"abbbcc"
    assembly = Assembly(f.DATA, f.MORE | f.BUFFERS, total(len(data)) + data[:-6], LIMIT)
    for at in range(6):
        target = assembly.target(1)
        assert target.nbytes == 1
        target[:] = b"abbbcc"[at : at + 1]
        assembly.advance(1)
    body, buffers = assembly.finish()
    assert (bytes(body), [bytes(each) for each in buffers]) == (b"a", [b"bbb", b"", b"cc"])


def resident() -> int:
    """Bytes of memory that this process really has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads what the kernel says of a process's memory")
@pytest.mark.parametrize(
    ("flags", "first"),
    [
        pytest.param(f.MORE, total(LIMIT), id="a body"),
        pytest.param(f.MORE | f.BUFFERS, total(LIMIT) + head(LIMIT - 16), id="a buffer"),
        pytest.param(
            f.MORE | f.BUFFERS,
            total(8 + 16_000 * (8 + f.SMALL)) + head(*[f.SMALL] * 16_000),
            id="many buffers just too small to be mapped",
        ),
        pytest.param(
            f.MORE | f.BUFFERS, total(8 + 8000 * (8 + 130_000)) + head(*[130_000] * 8000), id="many larger buffers"
        ),
    ],
)
def test_a_gigabyte_that_is_announced_and_not_sent_costs_nothing(flags, first):
    before = resident()
    kept = [Assembly(f.DATA, flags, first, LIMIT + (1 << 20)) for _ in range(8)]
    assert resident() - before < 8 << 20
    assert all(each.left for each in kept)


def test_memory_of_no_bytes_can_be_had():
    assert len(allocate(0)) == 0


def test_memory_that_is_not_there_is_the_peers_fault():
    with pytest.raises(RemoteProtocolError, match="no memory for"):
        allocate(1 << 62)
