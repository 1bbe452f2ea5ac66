"""NumPy arrays, torch tensors, and other objects that support DLPack.

This module imports neither NumPy nor torch, except NumPy for an array that arrived. A program that sends their values
has imported them already, and a tensor arrives as an array where torch is not imported.
"""

from __future__ import annotations

import importlib
import re
import sys
from functools import lru_cache
from types import ModuleType
from typing import Any

import msgspec
from msgspec.msgpack import Decoder, Ext

from triton_distributed.errors import DecodeError
from triton_distributed.payload.outofband import NDARRAY, TENSOR, Arrived, Payload, encode_header, lent, place

MAX_FIELDS = 1024  # fields of a structured dtype, on all levels together: enough for a record type
MAX_LEVELS = 32  # nesting levels of structured dtypes; NumPy's arrays once had the same limit of dimensions

_SIMPLE = re.compile(r"[<>|=](?:[biufcSUV][0-9]{1,9}|[Mm]8(?:\[[0-9]{0,9}(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?)\Z")
_ADDED = r"(?a)(?P<module>[A-Za-z_][\w.]{0,100})\.(?P<name>[A-Za-z_]\w{0,60}):(?P<size>[1-9][0-9]{0,4})\Z"
"""The name of a dtype that another library added to NumPy, e.g. `ml_dtypes.bfloat16:2`, with bytes per element."""

_TORCH = {
    "bool": "|b1",
    "uint8": "|u1",
    "int8": "|i1",
    "uint16": "<u2",
    "int16": "<i2",
    "uint32": "<u4",
    "int32": "<i4",
    "uint64": "<u8",
    "int64": "<i8",
    "float16": "<f2",
    "float32": "<f4",
    "float64": "<f8",
    "complex64": "<c8",
    "complex128": "<c16",
}
"""The dtypes that torch and NumPy share, for a receiver without torch."""

_TORCH_NAME = r"(?a)[a-pr-z]\w{0,60}\Z"  # names of quantized dtypes begin with q; they are excluded
_NUMBERS = ("float", "bfloat", "complex")  # beginnings of the names of dtypes that mean the same in ml_dtypes
_OF_SIZE = {1: "uint8", 2: "int16", 4: "int32", 8: "int64", 16: "complex128"}  # by bytes per element, for copies


class _Array(msgspec.Struct, array_like=True, frozen=True):
    payload: Payload
    dtype: Any
    shape: tuple[int, ...]
    layout: str  # NumPy's C or F; 0 for a scalar


class _Tensor(msgspec.Struct, array_like=True, frozen=True):
    payload: Payload
    dtype: str
    shape: tuple[int, ...]
    itemsize: int = 0  # bytes per element; a receiver needs no more to know of the dtype


_decode_array = Decoder(_Array).decode
_decode_tensor = Decoder(_Tensor).decode


def ndarray_to_wire(value: Any, buffers: list[memoryview] | None) -> Ext:
    """Send a NumPy array: any dtype without Python objects, any memory layout.

    Raises:
        TypeError: the dtype holds Python objects or has no size, or the array is masked.
    """
    np = sys.modules["numpy"]
    if type(value) is not np.ndarray:
        if hasattr(value, "mask"):
            raise TypeError("a masked array cannot travel: send .filled(), or its data and mask")
        value = value.view(np.ndarray)
    described = _describe(value.dtype)
    layout = "C"
    if not value.flags.c_contiguous:
        if value.flags.f_contiguous:
            layout = "F"
            view = value.T
        else:
            view = np.ascontiguousarray(value)
    else:
        view = value
    return Ext(NDARRAY, encode_header((place(_bytes_of(np, view), buffers), described, value.shape, layout)))


def _bytes_of(np: Any, array: Any) -> memoryview:
    try:
        return memoryview(array).cast("B")  # four times as fast; works for numbers in native byte order
    except (TypeError, ValueError):
        return memoryview(array.reshape(-1).view(np.uint8))


def scalar_to_wire(value: Any) -> Any:
    """Send a NumPy scalar: as Python's own number or text if that is exact, else as a scalar of its dtype.

    Raises:
        TypeError: the scalar holds Python objects.
    """
    dtype = value.dtype
    if dtype.kind in "biufSU" and not (dtype.kind == "f" and dtype.itemsize > 8):
        return value.item()
    np = sys.modules["numpy"]
    data = memoryview(np.asarray(value).reshape(-1).view(np.uint8)).tobytes()
    return Ext(NDARRAY, encode_header((data, _describe(dtype), (), "0")))


def tensor_to_wire(value: Any, buffers: list[memoryview] | None) -> Ext:
    """Send the bits of a dense torch tensor of any dtype in the CPU's memory.

    Raises:
        TypeError: the tensor lies elsewhere, or is nested, quantized or sparse; the text says what to send instead.
    """
    torch = sys.modules["torch"]
    if words := _not_dense(torch, value):
        raise TypeError(words)
    size = value.element_size()
    try:
        plain = value.detach().resolve_conj().resolve_neg().view(getattr(torch, _OF_SIZE[size]))
        flat = plain.contiguous().as_strided((plain.numel(),), (1,))  # a tensor of one element may have any stride
        view = memoryview(flat.view(torch.uint8).numpy()) if plain.numel() else memoryview(b"")
    except (RuntimeError, TypeError, KeyError) as error:  # e.g. from a subclass without memory of its own
        kind = type(value).__qualname__
        raise TypeError(
            f"a {kind} of {value.dtype} cannot travel ({error}): send plain tensors, e.g. .view(torch.uint8)"
        ) from error
    name = str(value.dtype).removeprefix("torch.")
    return Ext(TENSOR, encode_header((place(view, buffers), name, tuple(value.shape), size)))


def _not_dense(torch: Any, value: Any) -> str:
    """Say why a tensor is not dense in the CPU's memory, and what to send instead. Return "" for a dense tensor."""
    if value.is_nested:
        return "a nested tensor cannot travel: send list(tensor.unbind()), or tensor.to_padded_tensor(…)"
    if value.is_quantized:
        return (
            f"a tensor of {value.dtype} cannot travel, because its numbers mean nothing without their scale: send "
            "tensor.dequantize(), or tensor.int_repr() with the scales and zero points"
        )
    if value.layout != torch.strided:
        parts = _PARTS.get(str(value.layout), "")
        return f"a tensor of {value.layout} cannot travel: send tensor.to_dense(){parts}"
    if value.device.type == "meta":
        return "a tensor on meta has no values and cannot travel: send its shape and dtype"
    if value.device.type != "cpu":
        return f"a tensor on {value.device} cannot travel: send tensor.cpu()"
    return ""


_BY_ROWS = ", or tensor.crow_indices(), tensor.col_indices(), tensor.values() and the shape"
_BY_COLUMNS = ", or tensor.ccol_indices(), tensor.row_indices(), tensor.values() and the shape"
_PARTS = {
    "torch.sparse_coo": ", or tensor.indices(), tensor.values() and the shape",
    "torch.sparse_csr": _BY_ROWS,
    "torch.sparse_bsr": _BY_ROWS,
    "torch.sparse_csc": _BY_COLUMNS,
    "torch.sparse_bsc": _BY_COLUMNS,
}


def dlpack_to_wire(value: Any, buffers: list[memoryview] | None) -> Ext:
    """Send an object that another library exports through DLPack; it arrives as a NumPy array.

    Raises:
        TypeError: the object does not lie in the CPU's memory, or NumPy cannot read it.
    """
    kind = type(value).__qualname__
    if value.__dlpack_device__()[0] != 1:
        raise TypeError(f"a {kind} outside the CPU's memory cannot travel: copy it to the CPU first")
    try:
        seen = _numpy().from_dlpack(value)
    except ImportError:
        raise TypeError(f"a {kind} travels through NumPy, which is not installed") from None
    except (RuntimeError, BufferError, TypeError, ValueError) as error:
        # DLPack cannot name some dtypes of ml_dtypes. A library that uses these can make NumPy arrays itself.
        seen = _numpy().asarray(value) if hasattr(value, "__array__") else None
        if seen is None or seen.dtype.hasobject:
            raise TypeError(
                f"NumPy cannot read this {kind} through DLPack ({error}): send numpy.asarray(…) of it, or its bytes"
            ) from error
    return ndarray_to_wire(seen, buffers)


def ndarray_from_wire(header: memoryview, arrived: Arrived) -> Any:
    """Read an array that `ndarray_to_wire` wrote. The array uses the buffer itself, and is aligned.

    It is writable, unless the buffer lies in shared memory.

    Raises:
        DecodeError: NumPy is missing, or the header does not fit the buffer.
    """
    array = _decode_array(header)
    np = _imported_numpy()
    made = _over(np, arrived.take(array.payload), _dtype(np, array.dtype), array.shape, array.layout)
    return made[()] if array.layout == "0" else made


def tensor_from_wire(header: memoryview, arrived: Arrived) -> Any:
    """Read a tensor that `tensor_to_wire` wrote, if this process has imported torch and its torch has the dtype.

    Otherwise return an array. Its dtype is the one of NumPy or ml_dtypes with the same meaning, else `V1`, `V2` and so
    on: the bits alone, without arithmetic that would be wrong.

    Raises:
        DecodeError: torch and NumPy are missing, or the header does not fit the buffer.
    """
    tensor = _decode_tensor(header)
    name, plain = tensor.dtype, _TORCH.get(tensor.dtype)
    if plain is None and not (re.match(_TORCH_NAME, name) and 0 < tensor.itemsize < 100_000):
        raise DecodeError(f"a tensor of invalid dtype {name!r} with {tensor.itemsize} bytes per element")
    buffer = arrived.take(tensor.payload)
    torch = sys.modules.get("torch")
    dtype = getattr(torch, name, None)
    if torch is not None and isinstance(dtype, torch.dtype) and tensor.itemsize in (0, dtype.itemsize):
        _check_size(buffer, tensor.shape, dtype.itemsize)
        if 0 in tensor.shape:
            return torch.empty(tensor.shape, dtype=dtype)
        if (writable := lent(buffer)) is not None:
            buffer = writable()  # torch has no read-only tensors.
        elif memoryview(buffer).readonly:
            buffer = bytearray(buffer)
        return torch.frombuffer(buffer, dtype=dtype).reshape(tensor.shape)
    if plain is None:
        plain = f"ml_dtypes.{name}:{tensor.itemsize}" if name.startswith(_NUMBERS) else f"|V{tensor.itemsize}"
    np = _imported_numpy()
    return _over(np, buffer, _dtype(np, plain), tensor.shape, "C")


def _over(np: Any, buffer: Any, dtype: Any, shape: tuple[int, ...], layout: str) -> Any:
    _check_size(buffer, shape, dtype.itemsize)
    if lent(buffer) is not None:
        # NumPy would let a program make an array over the memory itself writable; not one over the read-only view.
        array = np.frombuffer(buffer, np.uint8).view(dtype).reshape(shape, order="F" if layout == "F" else "C")
        return array if array.flags.aligned else array.copy(order="K")
    array = np.ndarray(shape, dtype, buffer, order="F" if layout == "F" else "C")
    if array.flags.writeable and array.flags.aligned:
        return array
    return array.copy(order="K")


def _check_size(buffer: Any, shape: tuple[int, ...], itemsize: int) -> None:
    wanted = itemsize
    for each in shape:
        if each < 0:
            raise DecodeError(f"an array of invalid shape {shape}")
        wanted *= each
    size = memoryview(buffer).nbytes
    if size != wanted:
        raise DecodeError(f"an array of shape {shape} with {itemsize} bytes per element came with {size} bytes")


@lru_cache(maxsize=256)  # more than a program uses
def _describe(dtype: Any) -> Any:
    """Describe a dtype in plain values that `_dtype` can check before NumPy sees them."""
    if dtype.hasobject:
        raise TypeError(f"an array of dtype {dtype} holds Python objects and cannot travel: use .tolist()")
    if not dtype.itemsize:
        raise TypeError(f"an array of dtype {dtype} has elements without a size and cannot travel")
    if dtype.names is not None or dtype.subdtype is not None:
        return _describe_structured(dtype, [MAX_FIELDS], 0)
    if dtype.num in range(256) and _SIMPLE.match(dtype.str):  # other libraries added all other dtypes
        return dtype.str
    text = f"{dtype.type.__module__}.{dtype.type.__name__}:{dtype.itemsize}"
    return text if re.match(_ADDED, text) else f"|V{dtype.itemsize}"


def _describe_structured(dtype: Any, left: list[int], level: int) -> Any:
    left[0] -= 1
    if left[0] < 0 or level > MAX_LEVELS:
        raise TypeError(f"an array of a dtype of more than {MAX_FIELDS} fields or {MAX_LEVELS} levels cannot travel")
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return [_describe_structured(base, left, level + 1), list(shape)]
    if dtype.names is None:
        return _describe(dtype)
    fields: list[Any] = [dtype.itemsize]
    for name in dtype.names:
        part, offset, *title = dtype.fields[name]
        described = [name, offset, _describe_structured(part, left, level + 1)]
        fields.append([*described, *title] if title and isinstance(title[0], str) else described)
    return fields


def _dtype(np: Any, described: Any) -> Any:
    if isinstance(described, str):
        return _named_dtype(described)
    return _structured(np, described, [MAX_FIELDS], 0)


def _structured(np: Any, described: Any, left: list[int], level: int) -> Any:
    left[0] -= 1
    if left[0] < 0 or level > MAX_LEVELS:
        raise DecodeError(f"a dtype of more than {MAX_FIELDS} fields or {MAX_LEVELS} levels")
    match described:
        case str():
            return _named_dtype(described)
        case [(str() | list()) as base, list(shape)] if all(type(each) is int and each > 0 for each in shape):
            return np.dtype((_structured(np, base, left, level + 1), tuple(shape)))
        case [int(itemsize), *parts] if all(map(_is_field, parts)):
            return np.dtype(
                {
                    "names": [part[0] for part in parts],
                    "offsets": [part[1] for part in parts],
                    "formats": [_structured(np, part[2], left, level + 1) for part in parts],
                    "titles": [part[3] if len(part) > 3 else None for part in parts],
                    "itemsize": itemsize,
                }
            )
    raise DecodeError("the description of a dtype is malformed")


def _is_field(part: Any) -> bool:
    match part:
        case [str(), int(), str() | list()] | [str(), int(), str() | list(), str()]:
            return True
    return False


def _named_dtype(text: str) -> Any:
    if _SIMPLE.match(text):
        dtype = _simple_dtype(text)
        if dtype.itemsize:
            return dtype
    elif text in _added_dtypes:
        return _added_dtypes[text]
    elif added := re.match(_ADDED, text):
        return _added_dtype(text, added["module"], added["name"], int(added["size"]))
    raise DecodeError(f"an array of unknown dtype {text!r}")


@lru_cache(maxsize=256)  # more than a program uses
def _simple_dtype(text: str) -> Any:
    return _imported_numpy().dtype(text)


_added_dtypes: dict[str, Any] = {}  # dtypes found so far; bounded by what the imported libraries added


def _added_dtype(text: str, module_name: str, name: str, size: int) -> Any:
    """Return a dtype that another library added to NumPy; if that library is not imported, a dtype of the bits, `V…`.

    Only ml_dtypes is imported when needed.
    """
    np, module = _imported_numpy(), sys.modules.get(module_name)
    if module is None and module_name == "ml_dtypes":
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            module = None
    # NumPy's own dtypes have shorter names. Its abstract classes would be deprecated arguments of `np.dtype`.
    added = isinstance(module, ModuleType) and module_name.partition(".")[0] != "numpy"
    kind = vars(module).get(name) if added else None
    try:
        dtype = np.dtype(kind) if isinstance(kind, type) and issubclass(kind, np.generic) else None
    except TypeError:  # the class stands for many dtypes
        dtype = None
    if dtype is None or dtype.isbuiltin != 2 or dtype.itemsize != size or dtype.hasobject:
        return np.dtype(f"V{size}")
    _added_dtypes[text] = dtype
    return dtype


def _numpy() -> Any:
    return importlib.import_module("numpy")


def _imported_numpy() -> Any:
    np = sys.modules.get("numpy")
    if np is not None:
        return np
    try:
        return _numpy()
    except ImportError:
        raise DecodeError("it contains an array, but NumPy is not installed here: pip install numpy") from None
