"""Large messages: their bytes go from the socket straight to where they stay."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from triton_distributed.errors import RemoteProtocolError
from triton_distributed.wire.frames import GoawayCode

SCRATCH = 8 * 1024  # read at once while fragments come, so that most of each is read in place


class BulkTarget(Protocol):
    """A session whose large messages are read.

    Attributes:
        heard: something has come.
        holding: nothing is read for now.
    """

    heard: bool
    holding: bool

    @property
    def direct(self) -> bool:
        """The next bytes belong into `direct_buffer()`."""

    def direct_buffer(self) -> memoryview:
        """Where the next received bytes belong."""

    def read_in_place(self, count: int) -> None:
        """So many bytes were read into `direct_buffer()`."""

    def bulk_over(self) -> None:
        """Reads come as plain bytes again."""

    def break_off(self, code: int, words: str) -> None:
        """The peer broke the protocol."""

    # as an asyncio.Protocol

    def data_received(self, data: bytes) -> None: ...

    def connection_lost(self, error: Exception | None) -> None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...


class InPlaceReader(asyncio.BufferedProtocol):
    """Takes a session's place at its transport while the fragments of large messages come.

    The bytes of a fragment are read from the socket into the message itself; the header of the next one, and whatever
    small frames stand between, through a small buffer. `begin` switches over; the second read without a fragment
    switches back.
    """

    @classmethod
    def begin(cls, session: BulkTarget, transport: Any) -> InPlaceReader | None:
        """Switch a session's transport over; None where the transport cannot."""
        if not getattr(transport, "reads_in_place", True):
            return None
        reader = cls(session, transport)
        reader._switch(reader)
        return reader

    def __init__(self, session: BulkTarget, transport: Any) -> None:
        self._session, self._transport = session, transport
        self._scratch = memoryview(bytearray(SCRATCH))
        self._idle = 0  # reads since the last fragment

    def _switch(self, protocol: object) -> None:
        if not self._transport.is_closing():
            self._transport.pause_reading()
            self._transport.set_protocol(protocol)
            if not self._session.holding:
                self._transport.resume_reading()

    def get_buffer(self, sizehint: int) -> Any:
        return self._session.direct_buffer() if self._session.direct else self._scratch

    def buffer_updated(self, count: int) -> None:
        session = self._session
        session.heard = True
        if session.direct:
            self._idle = 0
            try:
                session.read_in_place(count)
            except RemoteProtocolError as error:
                session.break_off(GoawayCode.PROTOCOL, str(error))
        else:
            self._idle += 1
            session.data_received(bytes(self._scratch[:count]))
        if self._idle > 1 and not session.direct:
            session.bulk_over()
            self._switch(session)

    def connection_lost(self, error: Exception | None) -> None:
        self._session.connection_lost(error)

    def eof_received(self) -> None:
        return None

    def pause_writing(self) -> None:
        self._session.pause_writing()

    def resume_writing(self) -> None:
        self._session.resume_writing()
