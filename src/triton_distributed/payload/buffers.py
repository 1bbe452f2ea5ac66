"""Plain memory: bytes, bytearray, memoryview, array.array and other objects with the buffer protocol."""

from __future__ import annotations

from array import array
from typing import Any

from msgspec.msgpack import Decoder, Ext

from triton_distributed.errors import DecodeError
from triton_distributed.payload.outofband import (
    ARRAY_ARRAY,
    BYTEARRAY,
    BYTES,
    MEMORYVIEW,
    Arrived,
    Payload,
    encode_header,
    flat,
    place,
)

_decode_payload = Decoder(Payload).decode
_decode_array = Decoder(tuple[Payload, str]).decode
_decode_view = Decoder(tuple[Payload, str, tuple[int, ...]]).decode

_FORMATS = frozenset("bBhHiIlLqQnNefdc?")  # the formats that memoryview.cast can restore
_TYPECODES = frozenset("bBhHiIlLqQfd")  # without `u` and `w`, since text travels as str


def bytes_to_wire(value: bytes, buffers: list[memoryview] | None) -> Ext:
    """Send large `bytes` as an extension: both ends would copy msgpack's own bytes."""
    return Ext(BYTES, encode_header(place(memoryview(value), buffers)))


def bytearray_to_wire(value: bytearray, buffers: list[memoryview] | None) -> Ext:
    """Send a bytearray, which arrives as a bytearray."""
    return Ext(BYTEARRAY, encode_header(place(memoryview(value), buffers)))


def memoryview_to_wire(value: memoryview, buffers: list[memoryview] | None) -> Ext:
    """Send a memoryview with its format and shape.

    Raises:
        TypeError: the format is not a plain native format.
        ValueError: the memoryview was released.
    """
    form = value.format.lstrip("@=<") if memoryview(b"\1\0").cast("H")[0] == 1 else value.format.lstrip("@=")
    if form not in _FORMATS or (form != value.format and _width(form) != value.itemsize):
        raise TypeError(f"a memoryview of format {value.format!r} cannot travel: cast it to 'B'")
    return Ext(MEMORYVIEW, encode_header((place(flat(value), buffers), form, value.shape)))


def array_to_wire(value: array[Any], buffers: list[memoryview] | None) -> Ext:
    """Send an `array.array`, which arrives as an `array.array`.

    Raises:
        TypeError: the array holds text.
    """
    if value.typecode not in _TYPECODES:
        raise TypeError(f"an array.array of typecode {value.typecode!r} cannot travel: send its text as str")
    return Ext(ARRAY_ARRAY, encode_header((place(flat(memoryview(value)), buffers), value.typecode)))


def memory_from_wire(code: int, header: memoryview, arrived: Arrived) -> Any:
    """Read an extension that a function of this module wrote.

    Raises:
        DecodeError: the header or its buffer is malformed.
    """
    if code == BYTES:
        return bytes(arrived.take(_decode_payload(header)))
    if code == BYTEARRAY:
        buffer = arrived.take(_decode_payload(header))
        return buffer if type(buffer) is bytearray else bytearray(buffer)
    if code == MEMORYVIEW:
        form: Any
        payload, form, shape = _decode_view(header)
        if form not in _FORMATS:
            raise DecodeError(f"a memoryview of unknown format {form!r}")
        view = flat(memoryview(arrived.take(payload)))
        if view.nbytes == 0:
            return view.cast(form)
        return view if (form, shape) == ("B", (view.nbytes,)) else view.cast("B").cast(form, shape)
    payload, typecode = _decode_array(header)
    if typecode not in _TYPECODES:
        raise DecodeError(f"an array.array of unknown typecode {typecode!r}")
    values = array(typecode)
    values.frombytes(flat(memoryview(arrived.take(payload))))
    return values


def _width(form: Any) -> int:
    return int(memoryview(bytes(16)).cast(form).itemsize)
