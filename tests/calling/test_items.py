"""Items that are passed on as they came."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from triton_distributed.calling.items import PassedOn
from triton_distributed.errors import DecodeError
from triton_distributed.wire import frames as f

encode = msgspec.msgpack.encode


def passed(kind: int, payload: Any, *, flags: int = 0, buffers: Any = None, keeps_none: bool = True) -> tuple[int, Any]:
    """How many items there are, and what the reader gets: a list stands for a batch."""
    items = PassedOn(list, keeps_none).items((0, kind, flags, payload, buffers))
    return len(items), list(items)


def test_the_small_items_of_a_message_are_one_batch_of_their_bytes():
    assert passed(f.BATCH, encode([1, {"a": b"b"}, None])) == (3, [[encode(1), encode({"a": b"b"}), encode(None)]])
    assert passed(f.DATA, encode("one")) == (1, [[encode("one")]])
    assert passed(f.DATA, encode(None)) == (1, [[encode(None)]])


def test_none_is_left_out_where_it_means_no_data():
    assert passed(f.BATCH, encode([None, 1]), keeps_none=False) == (2, [[encode(1)]])
    assert passed(f.DATA, encode(None), keeps_none=False) == (1, [])


def test_items_with_flags_buffers_or_many_bytes_are_decoded():
    large = "x" * f.SMALL
    assert passed(f.DATA, encode(large)) == (1, [large])
    assert passed(f.DATA, bytearray(encode(1))) == (1, [1])
    assert passed(f.DATA, encode(1), buffers=[]) == (1, [1])
    assert passed(f.DATA, encode([b"token", 1]), flags=f.CHECKPOINT) == (1, [[b"token", 1]])


@pytest.mark.parametrize("payload", [b"\x93\x01", encode({"a": 1})])
def test_a_malformed_batch_is_an_error(payload):
    with pytest.raises(DecodeError, match="a malformed batch"):
        passed(f.BATCH, payload)
