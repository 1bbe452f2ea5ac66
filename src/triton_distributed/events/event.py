"""An event and its encoding: the publisher's id and the payload in one bytes object."""

from __future__ import annotations

from struct import Struct
from typing import Any

import msgspec

from triton_distributed.errors import DecodeError
from triton_distributed.payload.codec import Message, decode, encode

VERSION = 1

_HEAD = Struct(">BQI")
"""Header: version, the publisher's instance id, number of buffers. The buffers' lengths, body and buffers follow."""

_LENGTH = Struct(">Q")


class Event(msgspec.Struct):
    """A published event.

    Attributes:
        name: the name that was given to `publish`.
        data: the payload, decoded like the payload of a request.
        publisher: the instance id of the runtime that published it.
        subject: the subject under which it was sent.
    """

    name: str
    data: Any
    publisher: int
    subject: str


def pack(payload: object, publisher: int, what: str = "event") -> bytes:
    """Encode a payload, followed by its out-of-band buffers.

    Args:
        publisher: the publisher's instance id.
        what: the payload's name in error texts.

    Raises:
        TypeError, ValueError: the payload cannot be encoded; see `payload.codec.encode`.
    """
    message = encode(payload, what)
    if isinstance(message, Message):
        lengths = [_LENGTH.pack(buffer.nbytes) for buffer in message.buffers]
        return b"".join([_HEAD.pack(VERSION, publisher, len(lengths)), *lengths, message.body, *message.buffers])
    return _HEAD.pack(VERSION, publisher, 0) + message


def unpack(data: bytes) -> tuple[Any, int]:
    """Return the payload and the publisher's id.

    Raises:
        DecodeError: the data was not written by `pack`.
    """
    if len(data) < _HEAD.size:
        raise DecodeError(f"an event must have at least {_HEAD.size} bytes, not {len(data)}")
    version, publisher, count = _HEAD.unpack_from(data)
    if version != VERSION:
        raise DecodeError(f"an event has version {version}; this end reads version {VERSION}")
    view = memoryview(data)
    if not count:
        return decode(view[_HEAD.size :]), publisher
    start = _HEAD.size + count * _LENGTH.size
    if start > len(data):
        raise DecodeError(f"an event of {len(data)} bytes cannot have {count} buffers")
    lengths = [_LENGTH.unpack_from(data, at)[0] for at in range(_HEAD.size, start, _LENGTH.size)]
    end = len(data) - sum(lengths)
    if end < start:
        raise DecodeError(f"an event of {len(data)} bytes has buffers of {sum(lengths)}")
    buffers, at = [], end
    for length in lengths:
        # Each buffer is copied: arrays use its memory and may be changed, while other subscribers read the same event.
        buffers.append(bytearray(view[at : at + length]))
        at += length
    return decode(view[start:end], buffers), publisher
