"""The reading side of a session: takes bytes from the transport and serves their frames, one quantum at a time."""

from __future__ import annotations

import logging
from time import monotonic
from typing import Any

from triton_distributed.compiled import mypyc_attr
from triton_distributed.errors import RemoteProtocolError
from triton_distributed.transport.acceptance import Acceptance
from triton_distributed.transport.bulk_reader import BulkReader
from triton_distributed.transport.fairness import BUSY_BYTES, FairShare
from triton_distributed.transport.leftovers import read_remainder
from triton_distributed.transport.stream import StreamSession
from triton_distributed.transport.tls import TlsFailed
from triton_distributed.wire import frames as f

logger = logging.getLogger("triton_distributed.transport")

# At most this many frames may wait while the kernel accepts none. Credit bounds items, so a longer queue can only
# hold answers to pings and refusals. A peer that causes them and does not read is disconnected.
MOST_WAITING = 200_000
# With more than this many frames and handlers waiting, an accepting end stops reading from a peer that reads no output.
# A dialling end always reads: if both ends waited for the other one to read, neither would.
UNTAKEN = 128


@mypyc_attr(allow_interpreted_subclasses=True)
class Reader(StreamSession):
    """What reading needs from its session.

    Attributes:
        heard: something has arrived since the last check of `transport.liveness`.
        acceptance: handlers that have not begun.
    """

    heard: bool
    acceptance: Acceptance

    def eof_received(self) -> bool | None:
        return None

    def begin_accepted(self) -> None:
        """Begin the handlers that may begin."""
        raise NotImplementedError

    def break_off(self, code: int, words: str) -> None:
        """Send the peer the reason, and close."""
        raise NotImplementedError


class Inbound:
    """The reading side of a connected session.

    Args:
        session: the session; it is also the transport's protocol.
        transport: the source of the bytes.
        share: the quantum, and the queue of the sessions that wait for their turn.
        dialled: True if this end opened the connection.

    Attributes:
        held: reading is paused: bytes that were read wait for their turn, or the peer reads no answers.
        serving: frames are being served; handlers begin afterwards.
        choked: reading is paused until the peer reads output.
        taken: bytes read since the last turn.
        bulk: reads large messages in place while they arrive, else None.
    """

    __slots__ = (
        "_connection",
        "_counted",
        "_dialled",
        "_pausable",
        "_session",
        "_transport",
        "_waits",
        "bulk",
        "choked",
        "held",
        "serving",
        "share",
        "taken",
    )

    def __init__(self, session: Reader, transport: Any, share: FairShare, dialled: bool) -> None:
        self._session, self._connection = session, session.connection
        self._transport, self._dialled = transport, dialled
        self._pausable: bool = getattr(transport, "reads_in_place", True)
        self._counted = share
        self.share = share if self._pausable else share.unlimited()
        self._waits = False  # in the queue of `share`
        self.held = self.serving = self.choked = False
        self.taken = 0
        self.bulk: BulkReader | None = None

    def serve(self, data: bytes) -> None:
        """Process bytes, one quantum at most; if there is more, wait for the next turn and read nothing meanwhile."""
        session, connection, share = self._session, self._connection, self.share
        session.heard = True
        self.taken += len(data)
        self._counted.received += len(data)
        connection.read_at = monotonic()
        self.serving, more = True, False
        try:
            if connection.direct is not None:
                data = connection.copy_direct(data)
            # TLS delivers all that it has decrypted, even while this session waits for its turn.
            more = connection.receive_some(data, 0 if self.held else share.frames)
        except RemoteProtocolError as error:
            session.break_off(f.GoawayCode.PROTOCOL, str(error))
        finally:
            self.serving = False
        if session.acceptance.accepted:
            session.begin_accepted()
        if connection.direct is not None and self.bulk is None:
            self.bulk = BulkReader.begin(self, session, self._transport)
        # Between fragments: serve what came, before the loop goes on reading fragments.
        more = more or self.taken > share.read_bytes or (self.bulk is not None and len(data) > f.HEADER_BYTES)
        if (more or session.paused) and not self.held and session.lost is None:
            if session.paused and len(connection.out) + len(session.acceptance) > UNTAKEN and self._may_choke():
                self.choked = True
                self._read(False)
            elif more:
                self._wait()

    def take_turn(self) -> None:
        """Serve one quantum of the bytes read, and queue again if there is more."""
        self._waits = False
        if self._session.lost is not None:
            return
        self.held = False
        self.taken = 0
        try:
            self.serve(b"")
        except BaseException:  # as a transport does if its protocol raises; the loop reports it
            self._transport.abort()
            raise
        if not self.held:
            self._read(True)

    def output_taken(self) -> None:
        """Note that the kernel accepts output again: a choked session waits for its turn to read again."""
        if self.choked:
            self.choked = False
            self._wait()

    def take_remainder(self, error: Exception | None) -> bool:
        """Serve all that the peer sent before the connection was lost, without turns.

        Args:
            error: the connection's error; None if the peer closed it.

        Returns:
            whether everything that the peer ever sent has arrived.
        """
        connection = self._connection
        try:
            if self.held:
                connection.receive(b"")
            if error is None:
                return True
            if isinstance(error, TlsFailed):
                return False
            pieces, whole = read_remainder(self._transport, error)
            decrypted = getattr(self._transport, "decrypted", None)
            for data in pieces:
                if decrypted is not None:
                    data = decrypted(data)
                connection.receive(connection.copy_direct(data))
        except (RemoteProtocolError, TlsFailed) as broken:
            logger.info("session %s: %s", self._session.address, broken)
            return False
        return whole

    def _wait(self) -> None:
        """Read and serve nothing until it is this session's turn."""
        self._read(False)
        if not self._waits:
            self._waits = True
            self.share.wait(self)

    def _read(self, wanted: bool) -> None:
        self.held = not wanted
        if not self._transport.is_closing():
            (self._transport.resume_reading if wanted else self._transport.pause_reading)()

    def _may_choke(self) -> bool:
        """Handle a peer that asks and does not read the answers. True: read nothing more until it does."""
        if not self._dialled and self._pausable:
            return True
        if len(self._connection.out) > MOST_WAITING:
            self._session.break_off(f.GoawayCode.PROTOCOL, "the peer asks without reading the answers")
        return False

    # large messages, see `BulkTarget`

    def place(self) -> memoryview | None:
        """Return the memory for the next bytes; None if they are not part of a large message."""
        fragment = self._connection.direct
        return None if fragment is None else fragment.target()

    def placed(self, count: int, full: bool) -> None:
        """Note that `count` bytes were read into `place()`. If they filled it, more may be read in this turn."""
        session = self._session
        session.heard = True
        self.taken = self.taken + count if full else 0
        self._counted.received += count
        self._connection.read_at = monotonic()
        try:
            following = self._connection.direct_received(count)
        except RemoteProtocolError as error:
            session.break_off(f.GoawayCode.PROTOCOL, str(error))
            return
        if following:
            self.serve(following)
        most = self.share.read_bytes if self._connection.calm else BUSY_BYTES
        if self.taken > most and not self.held and session.lost is None:
            self._wait()

    def bulk_over(self) -> None:
        """Note that reads arrive as plain bytes again."""
        self.bulk = None
