"""`trd.share`: an array or buffer that is placed once for all processes of the host."""

from __future__ import annotations

import array
import contextlib
import mmap
import sys
from typing import Any, TypeVar, overload

from triton_distributed.payload.outofband import flat
from triton_distributed.system import placed

A = TypeVar("A")


@overload
def share(data: bytes | bytearray | memoryview | mmap.mmap | array.array[Any]) -> memoryview: ...
@overload
def share(data: A) -> A: ...


def share(data: Any) -> Any:
    """Copy an array or buffer once into memory that every process of this user on this host can map.

    Send the result, or a contiguous part of it, in any message. A receiver over a Unix socket maps it and uses it in
    place; what has less than 256 KiB, or goes over TCP or NATS, travels as bytes. The memory is freed with its last
    user on the host.
    It does not count in `TRD_SHARED_MEMORY_BYTES`, and setting that to 0 makes it travel as bytes.

    The copy takes about 0.1 s for 100 MB: call this with `asyncio.to_thread` where the event loop must not wait. If the
    system has no such memory, or not enough, the result lies in this process's own memory, and always travels as bytes.

    Args:
        data: a NumPy array of any shape without Python objects, or an object with a contiguous buffer.

    Returns:
        a read-only array of the same dtype and shape; for another buffer a read-only memoryview of the same format and
        shape.

    Raises:
        TypeError: `data` has no buffer, or holds Python objects.
    """
    modules = sys.modules
    if (np := modules.get("numpy")) is not None and isinstance(data, np.ndarray):
        return _array(np, data)
    if (torch := modules.get("torch")) is not None and isinstance(data, torch.Tensor):
        raise TypeError("a tensor cannot be shared, because torch has no read-only tensors: share tensor.numpy()")
    try:
        view = memoryview(data)
    except TypeError:
        raise TypeError(f"{type(data)!r} cannot be shared: share an array, or an object with a buffer") from None
    form: Any = view.format
    shape: Any = view.shape
    if form not in _FORMATS:
        raise TypeError(f"a memoryview of format {form!r} cannot be shared: cast it to 'B'")
    copied = _placed(flat(view))
    return copied if (view.ndim, form) == (1, "B") or not view.nbytes else copied.cast(form, shape)


_FORMATS = frozenset("bBhHiIlLqQnNefdc?")  # the formats that memoryview.cast can restore


def _array(np: Any, data: Any) -> Any:
    if data.dtype.hasobject:
        raise TypeError(f"an array of dtype {data.dtype} holds Python objects and cannot be shared")
    order = "F" if data.flags.f_contiguous and not data.flags.c_contiguous else "C"
    if not data.nbytes:
        made = data.copy(order=order)
        made.flags.writeable = False
        return made
    flat_array = np.ascontiguousarray(data.T if order == "F" else data).reshape(-1)
    copied = _placed(memoryview(flat_array.view(np.uint8)))
    return np.frombuffer(copied, np.uint8).view(data.dtype).reshape(data.shape, order=order)


def _placed(data: memoryview) -> memoryview:
    if data.nbytes:
        with contextlib.suppress(OSError):
            view = placed.place(data)
            if view is not None:
                return view
    return memoryview(bytes(data))
