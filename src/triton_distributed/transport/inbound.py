"""What a session takes in: bytes that are read, frames that are served, handlers that begin. All of it by turns."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from triton_distributed.errors import RemoteProtocolError
from triton_distributed.transport.bulk_reader import InPlaceReader
from triton_distributed.transport.fairness import CALM_S, FEW_FRAMES, FRAMES, Turns
from triton_distributed.transport.stream import Stream
from triton_distributed.wire import frames as f
from triton_distributed.wire.authentication import Authentication
from triton_distributed.wire.connection import Connection
from triton_distributed.wire.hello import Hello

# Frames that may wait while the kernel takes none. Items are bounded by credit, so beyond this only answers to pings
# and refusals can wait, and whoever asked for them reads nothing.
MOST_WAITING = 200_000
# An accepting end reads nothing more from such a peer long before that. A dialling end always reads: were both ends to
# wait until the other one reads, neither would.
UNTAKEN = 128


class Intake(Connection[Stream], asyncio.Protocol):
    """The half of a session that listens.

    Args:
        loop: the running loop.
        hello, window, session_window, authentication: see `Connection`.
        turns: shared by the sessions of one runtime.
        dialled: this end has opened the connection.

    Attributes:
        paused: the kernel takes no more for now; output waits in `out` and in the streams.
        lost: why it is gone, or None.
        heard: something has come since `transport.liveness` looked last.
        holding: it reads nothing for now: what it has read waits for its turn, or the peer takes no answers.
    """

    stream_type = Stream

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        hello: Hello,
        window: int,
        session_window: int,
        authentication: Authentication | None,
        turns: Turns,
        dialled: bool,
    ) -> None:
        super().__init__(hello, window, session_window, authentication)
        self.loop = loop
        self.paused = False
        self.lost: str | None = None
        self.heard = self.holding = False
        self._dialled = dialled
        self._transport: asyncio.Transport | None = None
        self._turns = turns
        self._receiving = False
        self._waits = False  # for its turn
        self._taken = 0  # bytes read since the last one
        self._turned = 0  # frames served in turns since all that was here was served
        self._few_until = 0.0  # it flooded, so it has few frames a turn until then
        self._choked = False  # nothing is read until output is taken
        self._pauses = True  # the transport can stop to read
        self._bulk: InPlaceReader | None = None
        # Handlers that may begin, and those of which the peer was told: at most one an open stream in both together.
        self._beginning: dict[Stream, Callable[[], None]] = {}
        self._told: dict[Stream, Callable[[], None]] = {}

    # what the other half does

    def break_off(self, code: int, words: str) -> None:
        """Tell the peer why and close."""
        raise NotImplementedError

    def flush(self) -> None:
        """Write what waits, as far as the kernel takes it."""
        raise NotImplementedError

    # reading

    def data_received(self, data: bytes) -> None:
        self.heard = True
        self._taken += len(data)
        # TLS hands over all that it has decrypted, also while this waits for its turn.
        frames = 0 if self.holding else self._turns.frames
        if self._few_until:
            if self.loop.time() < self._few_until:
                frames = min(frames, FEW_FRAMES)
            else:
                self._few_until = 0.0
        self._serve(data, frames)

    def take_turn(self) -> None:
        """Serve some of what was read, and wait again where that is not all."""
        self._waits = False
        if self.lost is None:
            self.heard, self.holding = True, False
            self._taken = 0
            try:
                frames = FEW_FRAMES
                if self._beginning or self._told:
                    self._begin()
                    frames = 0  # that was its turn
                if not self._waits:
                    self._serve(b"", frames)
            except BaseException:  # as the transport does where its protocol raises; the loop reports it
                if self._transport is not None:
                    self._transport.abort()
                raise
            self._turned += frames
            if not self.holding:
                if self._turned > FRAMES:
                    self._few_until = self.loop.time() + CALM_S
                self._turned = 0
                self._turns.readers += 1
                self._read(True)

    def _serve(self, data: bytes, frames: int) -> None:
        """Serve at most so many frames; where there are more, wait for the next turn and read nothing meanwhile."""
        self._receiving, more = True, False
        try:
            if self._direct is not None:
                data = self.copy_direct(data)
            more = self.receive_some(data, frames)
        except RemoteProtocolError as error:
            self.break_off(f.GoawayCode.PROTOCOL, str(error))
        finally:
            self._receiving = False
        if (self._beginning or self._told) and not self._waits:
            self._begin()
        if self._direct is not None and self._bulk is None:
            self._bulk = InPlaceReader.begin(self, self._transport)
        more = more or self._taken > self._turns.read_bytes
        if (more or self.paused) and not self.holding and self.lost is None:
            if self.paused and len(self.out) + len(self._beginning) + len(self._told) > UNTAKEN and self._choke():
                self._choked = True
                self._read(False)
            elif more:
                self._wait()

    def _wait(self) -> None:
        """Read nothing and serve nothing until it is this session's turn."""
        self._read(False)
        if not self._waits:
            self._waits = True
            self._turns.wait(self)

    def _read(self, wanted: bool) -> None:
        self.holding = not wanted
        if self._transport is not None and not self._transport.is_closing():
            (self._transport.resume_reading if wanted else self._transport.pause_reading)()

    def _choke(self) -> bool:
        """The peer asks and takes no answers. True: hear no more of it until it does."""
        if not self._dialled and self._pauses:
            return True
        if len(self.out) > MOST_WAITING:
            self.break_off(f.GoawayCode.PROTOCOL, "the peer asks without reading the answers")
        return False

    # handlers that may begin

    def accept(self, stream: Stream, begin: Callable[[], None]) -> None:
        """The handler of `stream` may begin: tell the peer when it does, and call `begin` once the kernel has that.

        So the peer knows for every request of a lost session whether a handler can have begun. Where the kernel takes
        nothing for now, or many are to begin, the handler waits; where the stream is closed meanwhile, it never begins.
        """
        self._beginning[stream] = begin
        if not self._receiving:
            self._begin()

    def _begin(self) -> None:
        """Begin as many handlers as may now, and wait for a turn with the others."""
        if not self._told:
            self._tell()
        if self.paused or self.lost is not None:
            return  # `resume_writing` comes back to this; a lost session has no streams
        told, self._told = self._told, {}
        self._turns.begun += len(told)
        for begin in told.values():
            begin()
        if self._beginning:
            self._wait()

    def _tell(self) -> None:
        """Tell the peer of as many handlers as may begin now."""
        if self.paused or self.lost is not None:
            return
        told, room = self._beginning, FEW_FRAMES if self._few_until else self._turns.room
        if len(told) <= room:
            self._beginning = {}
        else:
            told = dict(itertools.islice(told.items(), room))
            for stream in told:
                del self._beginning[stream]
        for stream in told:
            stream.accepted = True
        self._told = told
        if told:
            self.announce([stream.id for stream in told])
        self.flush()

    def withdraw(self, stream: Stream) -> None:
        """`stream` was closed early: its handler does not begin any more."""
        self._beginning.pop(stream, None)
        self._told.pop(stream, None)

    # large messages

    def read_in_place(self, count: int) -> None:
        """So many bytes of a large message have come."""
        self.direct_received(count)
        self._taken += count
        if self._taken > self._turns.read_bytes and not self.holding and self.lost is None:
            self._wait()

    def bulk_over(self) -> None:
        """Reads come as plain bytes again."""
        self._bulk = None
