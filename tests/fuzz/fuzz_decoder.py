"""Invariant: however a stream is cut into reads, the decoder gives the same frames and failure, and never raises.

The first byte of an input decides where it is cut; the rest is what the network brings.
"""

from __future__ import annotations

from triton_distributed.wire.decoder import FrameDecoder
from triton_distributed.wire.frames import HEADER


def _frame(size: int, *fields: int, payload: bytes = b"") -> bytes:
    return HEADER.pack(size, *fields) + payload


SEEDS = [
    b"\x01" + _frame(3, 1, 0, 7, payload=b"abc"),
    b"\x05" + _frame(0, 2, 1, 1) + _frame(300, 3, 0, 2, payload=bytes(300)),
    b"\x09" + _frame(2**31, 1, 0, 0),
    b"\x00",
]


def _decode(pieces: list[bytes], wide: bool) -> tuple[list[tuple[int, int, int, bytes]], str | None]:
    decoder = FrameDecoder()
    if wide:
        decoder.feed(_frame(0, 1, 0, 0))  # behind the hello frames are larger
    frames = [frame for piece in pieces for frame in decoder.feed(piece)]
    return frames, decoder.failure


def one_input(data: bytes) -> None:
    if not data:
        return
    step, wide, stream = data[0] % 32 + 1, data[0] >= 128, data[1:]
    whole = _decode([stream], wide)
    assert _decode([stream[at : at + step] for at in range(0, len(stream), step)], wide) == whole
    assert _decode([stream[:step], stream[step:]], wide) == whole
    assert sum(HEADER.size + len(frame[3]) for frame in whole[0]) <= len(stream)
