"""A fragment of a large message that is received in place: where its next bytes go."""

from __future__ import annotations

from typing import Generic, TypeVar

from triton_distributed.wire.assembly import Assembly
from triton_distributed.wire.frames import HEADER_BYTES
from triton_distributed.wire.stream import StreamCore

S = TypeVar("S", bound=StreamCore)
# The bytes of a fragment whose stream has ended go here. No byte of it is ever read.
_DROPPED = memoryview(bytearray(64 * 1024))


class Fragment(Generic[S]):
    """A fragment of which some bytes have not arrived.

    Args:
        stream: its stream; None if that has ended, so that the bytes are dropped.
        flags: flags of its frame.
        size: bytes of its payload.

    Attributes:
        missing: bytes that have not arrived.
    """

    __slots__ = ("_assembly", "flags", "missing", "size", "stream")

    def __init__(self, stream: S | None, flags: int, size: int) -> None:
        self.stream = stream
        self.flags = flags
        self.size = self.missing = size
        self._assembly: Assembly | None = None if stream is None else stream.assembly

    def target(self) -> memoryview:
        """Return the memory for the next bytes.

        If the message goes on after this fragment, the memory also has space for the header of the next frame: so one
        read takes both, and the next fragment overwrites the header.
        """
        if self._assembly is None:
            return _DROPPED[: self.missing]
        return self._assembly.target(self.missing + HEADER_BYTES)

    def received(self, count: int) -> bytes:
        """Note that `count` bytes were written to `target()`; returns those that follow the fragment."""
        missing = self.missing
        following = b""
        if count > missing:
            following = bytes(self.target()[missing:count])
            count = missing
        self.missing = missing - count
        if self._assembly is not None:
            self._assembly.advance(count)
        return following
