"""The header and the kinds, byte for byte: what other versions of this program rely on."""

from __future__ import annotations

import msgspec
import pytest

from triton_distributed.wire import frames as f
from triton_distributed.wire.frames import ErrorCode, GoawayCode, Kind, RejectCode


def test_a_frame_byte_for_byte():
    assert f.frame(f.DATA, 0x0102, b"abc", f.END) == bytes.fromhex("03000000 03 01 0201000000000000") + b"abc"
    assert f.HEADER_BYTES == 14


def test_a_request_header_is_a_header_and_a_prefix():
    both = f.REQUEST_HEADER.pack(32, f.REQUEST, f.END, 7, 1, 2, 0.5, 3, 4)
    assert both == f.HEADER.pack(32, f.REQUEST, f.END, 7) + f.REQUEST_PREFIX.pack(1, 2, 0.5, 3, 4)
    assert f.REQUEST_PREFIX_BYTES == 32


def test_the_numbers_of_kinds_and_codes_stay():
    assert {each.name: int(each) for each in Kind} == {
        "HELLO": 1,
        "REQUEST": 2,
        "DATA": 3,
        "BATCH": 4,
        "END": 5,
        "ERROR": 6,
        "CANCEL": 7,
        "CREDIT": 8,
        "ACCEPT": 9,
        "REJECT": 10,
        "GOAWAY": 11,
        "PING": 12,
        "PONG": 13,
        "AUTH": 14,
        "ASK": 15,
        "LOAD": 16,
        "MEMORY": 17,
    }
    assert [each.name for each in ErrorCode] == ["HANDLER", "INVALID", "DEADLINE", "CANCELLED"]
    assert [each.name for each in RejectCode] == ["OVERLOADED", "DRAINING", "UNKNOWN", "PAUSED"]
    assert [each.name for each in GoawayCode] == ["DRAINING", "PROTOCOL", "VERSION", "BUSY"]
    assert [int(each) for each in GoawayCode] == [0, 1, 2, 3]


def test_flags_are_bits_of_their_own():
    flags = [f.END, f.MORE, f.BUFFERS, f.ANNOTATED, f.GRACEFUL, f.CHECKPOINT, f.LENT]
    assert len({each.bit_count() for each in flags} | {sum(flags).bit_count()}) == 2


@pytest.mark.parametrize("extra", [0, 1, 1000])
def test_what_explains_a_code_is_cut_to_a_frame(extra):
    data = f.coded(f.ERROR, 1, 3, bytes(f.MAX_FRAME - 1 + extra))
    assert len(data) == f.HEADER_BYTES + f.MAX_FRAME
    assert data[f.HEADER_BYTES] == 3


@pytest.mark.parametrize("number", [0, 1, 15, 16, 17, 65535, 65536, 70000])
def test_an_array_is_what_msgpack_makes_of_it(number):
    items = [b"\x07"] * number
    assert f.array_of(items) == msgspec.msgpack.encode([7] * number)
