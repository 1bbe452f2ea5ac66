"""Memory inside messages: how raw bytes leave a value, and how they are put back.

msgpack knows one kind of bytes. All other memory (bytearray, memoryview, arrays, tensors) travels as a msgpack
extension whose header describes it. The header holds small memory itself. Large memory travels as a buffer next to the
message, which neither end copies, and the header holds the buffer's index.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from triton_distributed.errors import DecodeError

OUT_OF_BAND: Final = 16 * 1024
"""Memory of at least this many bytes travels next to the message.

Measured with CPython 3.11 on one core: one more copy of 16 KiB costs 0.2 µs at each end, and a message with a buffer
costs 3 µs more than one without, so from 16 KiB on a buffer is no loss.
"""

HUGE = 16 * 1024 * 1024
"""A copy of at least this many bytes uses huge pages.

The allocator takes fresh pages for each block above 32 MiB: with small ones a copy of 200 MB takes 105 ms, with huge
ones 24 ms. At 16 MiB, where it still keeps memory, both take 1.9 ms.
"""

_HUGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", None)

BYTES, BYTEARRAY, MEMORYVIEW, ARRAY_ARRAY, NDARRAY, TENSOR, MODEL = range(16, 23)
"""Extension codes. A user's own `msgspec.msgpack.Ext` may have the codes 0 to 15 and 23 to 127."""

Payload = int | memoryview
"""The part of a header that refers to memory: a buffer's index, or the bytes themselves."""

encode_header = msgspec.msgpack.Encoder().encode


class BufferNeeded(Exception):
    """The value holds memory that should travel out of band, but this encode collects no buffers."""


def place(view: memoryview, buffers: list[memoryview] | None) -> Payload:
    """Choose where bytes travel: in the header, or as one more of `buffers`.

    Args:
        view: C-contiguous, one-dimensional, format `B`.
        buffers: the buffers of the message so far; None if this encode collects none.

    Raises:
        BufferNeeded: the bytes should travel out of band, but `buffers` is None.
    """
    if view.nbytes < OUT_OF_BAND:
        return view
    if buffers is None:
        raise BufferNeeded
    buffers.append(view)  # bounded by the value; the check of a message's size follows where it is cut into frames
    return len(buffers) - 1


def copy_of(view: memoryview) -> memoryview:
    """Return a copy of bytes in memory of its own.

    Args:
        view: C-contiguous, one-dimensional, format `B`.

    Raises:
        MemoryError, OSError: there is no memory for it.
    """
    if view.nbytes < HUGE or _HUGE_PAGES is None:
        return memoryview(bytes(view))
    memory = mmap.mmap(-1, view.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # The kernel may lack huge pages.
        memory.madvise(_HUGE_PAGES)
    copied = memoryview(memory)
    copied[:] = view
    return copied


class Arrived:
    """The buffers that came with one message. Each can be taken once, so that a header cannot multiply memory."""

    __slots__ = ("_left",)

    def __init__(self, buffers: Sequence[Any] | None) -> None:
        self._left: list[Any] = list(buffers or ())

    def take(self, payload: Payload) -> Any:
        """Return the memory of `payload`: the buffer itself, or a new bytearray of the bytes in the header.

        Raises:
            DecodeError: there is no such buffer, or it was taken before.
        """
        if not isinstance(payload, int):
            return bytearray(payload)
        if not 0 <= payload < len(self._left):
            raise DecodeError(f"it refers to buffer {payload}, but only {len(self._left)} came with it")
        buffer, self._left[payload] = self._left[payload], None
        if buffer is None:
            raise DecodeError(f"it refers to buffer {payload} twice")
        return buffer


def lent(buffer: Any) -> Callable[[], memoryview] | None:
    """Return None for memory of the receiver's own, and for shared memory a function that makes it writable."""
    return getattr(buffer.obj, "writable", None) if type(buffer) is memoryview else None


def flat(view: memoryview) -> memoryview:
    """Return the same bytes as one C-contiguous view of format `B`. Only scattered bytes are copied."""
    if view.ndim == 1 and view.format == "B" and view.c_contiguous:
        return view
    if view.c_contiguous and view.nbytes:
        return view.cast("B")
    return memoryview(view.tobytes())
