"""Large messages: their bytes are read from the socket directly into the message."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from triton_distributed.wire.frames import HEADER_BYTES

# At most this many bytes are read at once between fragments: few, so that most of each fragment is read in place.
SCRATCH = 8 * 1024


class BulkTarget(Protocol):
    """Receives large messages: a session's inbound side.

    Attributes:
        held: reading is paused.
    """

    held: bool

    def place(self) -> memoryview | None:
        """Return the memory for the next bytes; None if they are not part of a large message."""

    def placed(self, count: int, full: bool) -> None:
        """Note that `count` bytes were read into `place()`. If they filled it, more may be read in this turn."""

    def bulk_over(self) -> None:
        """Note that reads arrive as plain bytes again."""


class BulkReader(asyncio.BufferedProtocol):
    """Replaces a session as its transport's protocol while fragments of large messages arrive.

    The bytes of a fragment are read from the socket into the message itself, together with the header after it. Small
    frames between fragments go through a small buffer. `begin` switches to this protocol; the third read in a row
    without a fragment switches back.
    """

    @classmethod
    def begin(cls, target: BulkTarget, session: Any, transport: Any) -> BulkReader | None:
        """Switch a session's transport to a new reader; None if the transport does not support it.

        Args:
            session: the transport's protocol until now.
        """
        if not getattr(transport, "reads_in_place", True):
            return None
        reader = cls(target, session, transport)
        reader._switch(reader)
        return reader

    def __init__(self, target: BulkTarget, session: Any, transport: Any) -> None:
        self._target, self._session, self._transport = target, session, transport
        self._scratch = memoryview(bytearray(SCRATCH))
        self._idle = 0  # reads since the last fragment
        self._size = 0  # of the memory that the bytes under way are read into; 0 for the scratch

    def _switch(self, protocol: object) -> None:
        if not self._transport.is_closing():
            self._transport.pause_reading()
            self._transport.set_protocol(protocol)
            if not self._target.held:
                self._transport.resume_reading()

    def get_buffer(self, sizehint: int) -> Any:
        place = self._target.place()
        if place is None:
            self._size = 0
            # The next fragment's header may come alone. Not a byte of the fragment is copied if only this is read.
            return self._scratch if self._idle else self._scratch[:HEADER_BYTES]
        self._size = place.nbytes
        return place

    def buffer_updated(self, count: int) -> None:
        target = self._target
        if self._size:
            self._idle = 0
            target.placed(count, count == self._size)
            return
        self._idle += 1
        self._session.data_received(bytes(self._scratch[:count]))
        if self._idle > 2 and target.place() is None:
            target.bulk_over()
            self._switch(self._session)

    def connection_lost(self, error: Exception | None) -> None:
        self._session.connection_lost(error)

    def eof_received(self) -> None:
        return None

    def pause_writing(self) -> None:
        self._session.pause_writing()

    def resume_writing(self) -> None:
        self._session.resume_writing()
