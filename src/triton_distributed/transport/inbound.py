"""What a session reads, and when: bytes come from the transport, and their frames are served, one quantum at a time."""

from __future__ import annotations

import logging
from typing import Any, Protocol

from triton_distributed.errors import RemoteProtocolError
from triton_distributed.transport.acceptance import Acceptance
from triton_distributed.transport.bulk_reader import BulkReader
from triton_distributed.transport.fairness import FairShare
from triton_distributed.transport.leftovers import read_remainder
from triton_distributed.transport.tls import TlsFailed
from triton_distributed.wire import frames as f

logger = logging.getLogger("triton_distributed.transport")

# At most this many frames may wait while the kernel takes none. Items are bounded by credit, so beyond this only
# answers to pings and refusals can wait, and a peer that asks for them and does not read is cut off.
MOST_WAITING = 200_000
# With this many frames and handlers waiting, an accepting end reads nothing more from a peer that takes no output. A
# dialling end always reads: were both ends to wait until the other one reads, neither would.
UNTAKEN = 128


class Reader(Protocol):
    """What reading needs of its session.

    Attributes:
        heard: something has come since the last check of whether the peer lives.
        paused: the kernel takes no output for now.
        lost: why the session is gone, or None.
        address: where the peer is, for the log.
        out: frames that wait to be written.
        acceptance: handlers that have not begun.
    """

    heard: bool
    paused: bool
    lost: str | None
    address: str
    out: list[bytes]
    acceptance: Acceptance

    @property
    def direct(self) -> object | None:
        """What the next bytes belong in, see `direct_buffer`; None where they are frames."""

    def direct_buffer(self) -> memoryview:
        """Where the next received bytes belong."""

    def direct_received(self, count: int) -> None:
        """`count` bytes were read into `direct_buffer()`."""

    def copy_direct(self, data: bytes) -> bytes:
        """Put bytes that were not read in place where they belong; returns the bytes after them."""

    def receive(self, data: bytes) -> None:
        """Take received bytes."""

    def receive_some(self, data: bytes, most: int) -> bool:
        """Take received bytes, and serve at most `most` frames. True: there may be more."""

    def begin_accepted(self) -> None:
        """Begin the handlers that may begin."""

    def break_off(self, code: int, words: str) -> None:
        """Tell the peer why, and close."""


class Inbound:
    """What a session that is connected reads.

    Args:
        session: takes the bytes; it is also the transport's protocol.
        transport: where they come from.
        share: the quantum, and the queue of the sessions that wait for their turn.
        dialled: this end has opened the connection.

    Attributes:
        held: nothing is read for now: what was read waits for its turn, or the peer takes no answers.
        serving: frames are being served; handlers begin when that is done.
        choked: nothing is read until the peer takes output.
        taken: bytes read since the last turn.
        bulk: what reads large messages in place, while they come.
    """

    __slots__ = (
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
        self._session, self._transport, self._dialled = session, transport, dialled
        self._pausable: bool = getattr(transport, "reads_in_place", True)
        self.share = share if self._pausable else share.unlimited()
        self._waits = False  # in the queue of `share`
        self.held = self.serving = self.choked = False
        self.taken = 0
        self.bulk: BulkReader | None = None

    def serve(self, data: bytes) -> None:
        """Take bytes, and serve one quantum; where there is more, wait for the next turn and read nothing meanwhile."""
        session, share = self._session, self.share
        session.heard = True
        self.taken += len(data)
        self.serving, more = True, False
        try:
            if session.direct is not None:
                data = session.copy_direct(data)
            # TLS hands over all that it has decrypted, also while this session waits for its turn.
            more = session.receive_some(data, 0 if self.held else share.frames)
        except RemoteProtocolError as error:
            session.break_off(f.GoawayCode.PROTOCOL, str(error))
        finally:
            self.serving = False
        if session.acceptance.accepted:
            session.begin_accepted()
        if session.direct is not None and self.bulk is None:
            self.bulk = BulkReader.begin(self, session, self._transport)
        more = more or self.taken > share.read_bytes
        if (more or session.paused) and not self.held and session.lost is None:
            if session.paused and len(session.out) + len(session.acceptance) > UNTAKEN and self._may_choke():
                self.choked = True
                self._read(False)
            elif more:
                self._wait()

    def take_turn(self) -> None:
        """Serve a quantum of what was read, and wait again where that is not all."""
        self._waits = False
        if self._session.lost is not None:
            return
        self.held = False
        self.taken = 0
        try:
            self.serve(b"")
        except BaseException:  # as the transport does where its protocol raises; the loop reports it
            self._transport.abort()
            raise
        if not self.held:
            self._read(True)

    def output_taken(self) -> None:
        """The kernel takes output again: a peer that took no answers is heard again, in its turn."""
        if self.choked:
            self.choked = False
            self._wait()

    def take_remainder(self, error: Exception | None) -> bool:
        """The connection was lost: serve what the peer said before, without turns.

        Args:
            error: what the connection failed with; None where the peer has ended it.

        Returns:
            whether all that the peer ever sent has arrived.
        """
        session = self._session
        try:
            if self.held:
                session.receive(b"")
            if error is None:
                return True
            if isinstance(error, TlsFailed):
                return False
            pieces, whole = read_remainder(self._transport, error)
            decrypted = getattr(self._transport, "decrypted", None)
            for data in pieces:
                if decrypted is not None:
                    data = decrypted(data)
                session.receive(session.copy_direct(data))
        except (RemoteProtocolError, TlsFailed) as broken:
            logger.info("session %s: %s", session.address, broken)
            return False
        return whole

    def _wait(self) -> None:
        """Read nothing and serve nothing until it is this session's turn."""
        self._read(False)
        if not self._waits:
            self._waits = True
            self.share.wait(self)

    def _read(self, wanted: bool) -> None:
        self.held = not wanted
        if not self._transport.is_closing():
            (self._transport.resume_reading if wanted else self._transport.pause_reading)()

    def _may_choke(self) -> bool:
        """The peer asks and takes no answers. True: read nothing more of it until it does."""
        if not self._dialled and self._pausable:
            return True
        if len(self._session.out) > MOST_WAITING:
            self._session.break_off(f.GoawayCode.PROTOCOL, "the peer asks without reading the answers")
        return False

    # large messages, see `BulkTarget`

    def place(self) -> memoryview | None:
        """Where the next bytes belong; None where they are not of a large message."""
        return self._session.direct_buffer() if self._session.direct is not None else None

    def placed(self, count: int) -> None:
        """`count` bytes were read into `place()`."""
        session = self._session
        session.heard = True
        self.taken += count
        try:
            session.direct_received(count)
        except RemoteProtocolError as error:
            session.break_off(f.GoawayCode.PROTOCOL, str(error))
        if self.taken > self.share.read_bytes and not self.held and session.lost is None:
            self._wait()

    def bulk_over(self) -> None:
        """Reads come as plain bytes again."""
        self.bulk = None
