"""Values that msgpack does not know: one function turns them into values that it knows, and one turns them back."""

from __future__ import annotations

import sys
from array import array
from collections import deque
from functools import partial
from typing import Any

from msgspec.msgpack import Encoder, Ext

from triton_distributed.errors import DecodeError
from triton_distributed.payload.arrays import (
    dlpack_to_wire,
    ndarray_from_wire,
    ndarray_to_wire,
    scalar_to_wire,
    tensor_from_wire,
    tensor_to_wire,
)
from triton_distributed.payload.buffers import (
    array_to_wire,
    bytearray_to_wire,
    bytes_to_wire,
    memory_from_wire,
    memoryview_to_wire,
)
from triton_distributed.payload.fields import is_model
from triton_distributed.payload.leaf_types import is_textual, to_text
from triton_distributed.payload.models import has_one_form, model_to_wire, read_form, written_form
from triton_distributed.payload.outofband import ARRAY_ARRAY, BYTES, MODEL, NDARRAY, OUT_OF_BAND, TENSOR, Arrived


def to_wire(value: Any, buffers: list[memoryview] | None) -> Any:
    """Turn a value that msgspec does not know into a value that it knows.

    Args:
        value: any value that msgspec's encoder passes to its hook.
        buffers: the buffers of the message so far; None if this encode collects none.

    Raises:
        BufferNeeded: the value needs a buffer, but `buffers` is None.
        TypeError: the value cannot travel; the text says what to send instead.
    """
    modules = sys.modules
    if (np := modules.get("numpy")) is not None:
        if isinstance(value, np.ndarray):
            return ndarray_to_wire(value, buffers)
        if isinstance(value, np.generic):
            return scalar_to_wire(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, bytes):
        return bytes(memoryview(value))
    if isinstance(value, bytearray):
        return bytearray_to_wire(value, buffers)
    if isinstance(value, array):
        return array_to_wire(value, buffers)
    if (torch := modules.get("torch")) is not None and isinstance(value, torch.Tensor):
        return tensor_to_wire(value, buffers)
    kind: Any = type(value)
    if is_model(kind):
        if has_one_form(kind):
            return value.model_dump(by_alias=True)
        return model_to_wire(value, _packer(buffers), partial(_memory_to_wire, buffers))
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        return dlpack_to_wire(value, buffers)
    if isinstance(value, deque):
        return list(value)
    if is_textual(kind):
        return to_text(value)
    try:
        view = memoryview(value)
    except TypeError:
        raise TypeError(refusal(value)) from None
    return memoryview_to_wire(view, buffers)


def _packer(buffers: list[memoryview] | None) -> Any:
    return _pack_without if buffers is None else Encoder(enc_hook=lambda each: to_wire(each, buffers)).encode


def _memory_to_wire(buffers: list[memoryview] | None, value: Any) -> Any:
    if type(value) is bytes:
        return value if len(value) < OUT_OF_BAND else bytes_to_wire(value, buffers)
    return bytearray_to_wire(value, buffers) if type(value) is bytearray else memoryview_to_wire(value, buffers)


_pack_without = Encoder(enc_hook=lambda each: to_wire(each, None)).encode


def from_wire(code: int, header: memoryview, arrived: Arrived) -> Any:
    """Read one extension.

    Raises:
        DecodeError: the extension is malformed for its code.
    """
    try:
        if code == NDARRAY:
            return ndarray_from_wire(header, arrived)
        if BYTES <= code <= ARRAY_ARRAY:
            return memory_from_wire(code, header, arrived)
        if code == TENSOR:
            return tensor_from_wire(header, arrived)
        if code == MODEL:
            return written_form(header, partial(from_wire, arrived=arrived))
    except DecodeError:
        raise
    except Exception as error:  # any error of a library that cannot use the header
        raise DecodeError(f"extension {code}: {error}") from error
    return Ext(code, bytes(header))


def model_from_wire(header: memoryview, arrived: Arrived) -> Any:
    """Read one `MODEL` extension for a handler that has the class: by field name, in Python's types.

    Raises:
        DecodeError: the extension is malformed.
    """

    def hook(code: int, part: memoryview) -> Any:
        return read_form(part, hook) if code == MODEL else from_wire(code, part, arrived)

    try:
        return read_form(header, hook)
    except DecodeError:
        raise
    except Exception as error:  # A library may raise anything for an invalid header.
        raise DecodeError(f"extension {MODEL}: {error}") from error


_SENDABLE = "use plain values, a dataclass, a msgspec.Struct, a pydantic model or an array"
_INSTEAD = {
    "generator": "send list(…) of it",
    "async_generator": "iterate over it and send its items",
    "coroutine": "await it first",
    "function": "only values travel",
    "method": "only values travel",
    "builtin_function_or_method": "only values travel",
    "type": "only values travel, not classes",
    "module": "only values travel",
    "complex": "send its two parts, or a NumPy complex128",
    "range": "send list(…) of it",
    "dict_keys": "send list(…) of it",
    "dict_values": "send list(…) of it",
    "dict_items": "send list(…) of it",
    "map": "send list(…) of it",
    "filter": "send list(…) of it",
    "zip": "send list(…) of it",
    "mappingproxy": "send dict(…) of it",
    "DataFrame": "send .to_dict(orient='list') or .to_numpy()",
    "Series": "send .to_list() or .to_numpy()",
    "Image": "send numpy.asarray(…) of it, or its encoded bytes",
    "URL": "send str(…) of it",
}


def refusal(value: Any) -> str:
    """Say that a value cannot travel, and what to send instead."""
    kind = type(value)
    return f"{kind!r} cannot travel: {_INSTEAD.get(kind.__name__, _SENDABLE)}"
