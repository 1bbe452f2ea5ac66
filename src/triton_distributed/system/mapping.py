"""Shared memory of other processes, mapped here."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable
from typing import Any

from triton_distributed.system.shared_memory import UNTRACKED, Refused, open_segment


class Lease(ctypes.Array):  # type: ignore[type-arg]
    """The memory of one buffer that arrived. Views and arrays of it refer to this object, which ends with the last."""

    _type_ = ctypes.c_ubyte
    _length_ = 0
    mapping: Mapping
    start: int
    end: int

    def writable(self) -> memoryview:
        """Return the buffer's bytes as memory that may be written and that no other buffer shares.

        Nothing is copied now, if this is the only use of the mapping and it can be mapped again: the kernel copies each
        page when it is first written.
        """
        view = memoryview(self).cast("B")[self.start : self.end]
        if self.mapping.uses > 1 or not self.mapping.reopens:
            return memoryview(bytearray(view))
        self.mapping.written = True
        return view


class Use(weakref.ref[Lease]):
    """A weak reference to a lease, and the key of its use.

    It is equal to itself only: the keys of leases that lay at the same address, one after the other, must not collide.
    """

    __slots__ = ()
    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Mapping:
    """A segment of another process, mapped here.

    The mapping is private: nothing written here reaches the other process.

    Args:
        process, descriptor: where the segment is open.
        size, cookie: what it must have.
        reopens: its owner keeps it open while a message refers to it, so that it can be mapped again.

    Attributes:
        uses: number of buffers in use; the owner of the mapping counts them down.
        written: it may have been written here.
        reopens: see above.

    Raises:
        Refused: the segment cannot be opened or mapped, or is not what it should be.
    """

    def __init__(self, process: int, descriptor: int, size: int, cookie: bytes, reopens: bool = True) -> None:
        self.uses, self.written, self.size, self.reopens = 0, False, size, reopens
        self._source = process, descriptor, cookie
        try:
            opened = open_segment(process, descriptor, size, cookie)
            try:
                writable = mmap.PROT_READ | mmap.PROT_WRITE
                self._memory = mmap.mmap(opened, size, mmap.MAP_PRIVATE, writable, **UNTRACKED)
            finally:
                os.close(opened)
        except (OSError, ValueError, OverflowError) as error:
            raise Refused(str(error)) from error
        self._start = address_of(memoryview(self._memory))
        self._type: Any = type("Lease", (Lease,), {"_length_": size})

    def lend(self, offset: int, size: int, ended: Callable[[Any], None]) -> tuple[memoryview, Use]:
        """Return a read-only view of some bytes, and a weak reference that calls `ended` when the last use is over.

        `ended` gets the weak reference, and may be called in any thread.
        """
        self.uses += 1
        lease = self._type.from_buffer(self._memory)
        lease.mapping, lease.start, lease.end = self, offset, offset + size
        return memoryview(lease).cast("B")[offset : offset + size].toreadonly(), Use(lease, ended)

    def offset_of(self, address: int, size: int) -> int | None:
        """Return the offset of bytes in this mapping; None if they lie elsewhere, or may have been written here."""
        offset = address - self._start
        return offset if not self.written and 0 <= offset <= self.size - size else None

    def fresh(self) -> Mapping:
        """Return a mapping in which nothing was written here: this one, or a new one if this one is in use.

        Raises:
            Refused: it cannot be mapped again.
        """
        if self.written and self.uses:
            process, descriptor, cookie = self._source
            return Mapping(process, descriptor, self.size, cookie)
        if self.written:
            self._memory.madvise(mmap.MADV_DONTNEED)
            self.written = False
        return self


class _Buffer(ctypes.Structure):
    """Py_buffer, which is part of CPython's stable ABI since 3.11."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("owner", ctypes.py_object),
        ("bytes", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("dimensions", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def address_of(view: memoryview) -> int:
    """Return the address of the first byte of a contiguous view."""
    buffer = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), 0)
    try:
        return buffer.address or 0
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
