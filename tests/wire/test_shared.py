"""Messages with buffers in shared memory: what is cut, what is put together, and what is refused."""

from __future__ import annotations

import pytest

from triton_distributed.errors import RemoteProtocolError
from triton_distributed.wire import frames as f
from triton_distributed.wire.assembly import Assembly, Place, decline, fragments, head_of
from triton_distributed.wire.shared import Offer, Said, memory_frame, offer_frame, read_memory

LIMIT = 1 << 24
STORE = bytes(range(256)) * 8192
DATA = memoryview(STORE)


class Store:
    """The shared memory of a test: segment 7. Counts what is borrowed."""

    def __init__(self) -> None:
        self.borrowed: list[tuple[int, int, int]] = []

    def __call__(self, segment: int, offset: int, size: int) -> memoryview:
        self.borrowed.append((segment, offset, size))
        if segment != 7:
            raise RemoteProtocolError(f"unknown {segment}")
        return DATA[offset : offset + size]


def assembled(
    body: bytes, buffers: list[memoryview], places: list[Place | None]
) -> tuple[bytes, list[bytes], int, int]:
    store, made, sent = Store(), None, 0
    for flags, start, piece in fragments(body, buffers, f.END, lambda: f.MAX_FRAME, places):
        payload = start + bytes(piece)
        sent += len(payload)
        assert len(payload) <= f.MAX_FRAME
        if made is None:
            made = Assembly(f.DATA, flags, payload, LIMIT, store)
            assert flags & f.LENT
        else:
            assert not flags & f.LENT
            made.write(memoryview(payload))
    assert made is not None
    got, found = made.finish()
    return bytes(got), [bytes(each) for each in found], sent, made.lent_bytes


@pytest.mark.parametrize("body", [b"", b"body", b"b" * 300_000])
def test_lent_buffers_do_not_follow_and_keep_their_places(body: bytes) -> None:
    own = memoryview(b"own" * 10_000)
    buffers = [DATA[:1_000_000], own, DATA[5:9], own[:20]]
    got, found, sent, lent = assembled(body, buffers, [(7, 0), None, (7, 5), None])
    assert got == body
    assert found == [bytes(each) for each in buffers]
    assert lent == 1_000_004
    assert len(body) + 30_020 < sent < len(body) + 31_000


def test_a_message_counts_with_its_lent_bytes_against_the_limit():
    ((flags, start, _),) = fragments(b"", [DATA[:1000]], f.END, lambda: f.MAX_FRAME, [(7, 0)])
    Assembly(f.DATA, flags, start, 1000 + len(start), Store())
    with pytest.raises(RemoteProtocolError, match="limit"):
        Assembly(f.DATA, flags, start, 999 + len(start), Store())


def test_an_end_without_shared_memory_refuses_a_reference():
    ((flags, start, _),) = fragments(b"", [DATA[:1000]], f.END, lambda: f.MAX_FRAME, [(7, 0)])
    with pytest.raises(RemoteProtocolError, match="shared memory 7"):
        Assembly(f.DATA, flags, start, LIMIT)


@pytest.mark.parametrize("cut", range(1, 17))
def test_a_head_without_its_places_is_refused(cut: int) -> None:
    head = head_of(0, [DATA], [(7, 0)])
    with pytest.raises(RemoteProtocolError, match="places"):
        Assembly(f.DATA, f.BUFFERS | f.LENT, head[:-cut], LIMIT, Store())


def test_a_reference_without_the_flag_is_a_size_that_does_not_fit():
    with pytest.raises(RemoteProtocolError, match="add up"):
        Assembly(f.DATA, f.BUFFERS, head_of(0, [DATA], [(7, 0)]), LIMIT, Store())


@pytest.mark.parametrize("body", [b"body", b"b" * 300_000])
def test_a_message_that_is_not_read_gives_its_memory_back(body: bytes) -> None:
    store = Store()
    for flags, start, piece in fragments(body, [DATA[:9]], f.END, lambda: f.MAX_FRAME, [(7, 3)]):
        decline(flags, start + bytes(piece), store)
    assert store.borrowed == [(7, 3, 9)]


def test_what_is_said_of_a_segment():
    offer = Offer(3, 1 << 40, 17, b"c" * 16, True)
    assert read_memory(offer_frame(offer)[f.HEADER_BYTES :]) == (Said.OFFERED, offer)
    for said in [*Said][1:]:
        assert read_memory(memory_frame(said, 3)[f.HEADER_BYTES :]) == (said, 3)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0",
        b"\0" * 9,
        b"\1" * 8,
        b"\1" * 10,
        b"\6" + bytes(8),
        b"\1" * 41,
        offer_frame(Offer(1, 2, 3, b"c" * 16))[-40:],
    ],
)
def test_a_malformed_memory_frame_is_refused(payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="malformed"):
        read_memory(payload)
