"""A session on an event loop: `wire.connection` joined to an asyncio transport.

What it reads is `transport.inbound`, and how handlers begin is `transport.acceptance`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from enum import IntEnum
from typing import Any

from triton_distributed.errors import RemoteProtocolError
from triton_distributed.system.fork import own
from triton_distributed.transport.acceptance import Acceptance
from triton_distributed.transport.address import Address
from triton_distributed.transport.fairness import FairShare
from triton_distributed.transport.host_loss import host_gone
from triton_distributed.transport.inbound import Inbound
from triton_distributed.transport.liveness import HOST_S, SILENT
from triton_distributed.transport.stream import Stream
from triton_distributed.transport.tcp import tcp_socket, tune
from triton_distributed.transport.tls import TlsFailed
from triton_distributed.wire import frames as f
from triton_distributed.wire.authentication import Authentication
from triton_distributed.wire.connection import Connection, OnRequest
from triton_distributed.wire.hello import Hello
from triton_distributed.wire.states import CLOSED
from triton_distributed.wire.window import ByteBudget

logger = logging.getLogger("triton_distributed.transport")

# A peer has this many seconds to say that it has read everything: one that is stopped must not delay a shutdown for
# long.
PART_S = 5.0
PARTING = b"the last"  # the payload of that PING


class Phase(IntEnum):
    """Where a session is in its life; it only goes forward."""

    GREETING = 0  # the hellos are not exchanged, or the session is not connected
    OPEN = 1
    GOING = 2  # the peer takes no more streams; those that are open go on
    LOST = 3  # it is gone, and no stream is open


class Session(Connection[Stream], asyncio.Protocol):
    """One end of a session.

    Args:
        loop: the running loop.
        hello: what this end says of itself.
        window: bytes that one stream may have unread.
        session_window: bytes that all streams together may have unread.
        hello_timeout_s: seconds that the peer has for its hello.
        host_timeout_s: seconds after which a TCP connection to a host that is gone is given up.
        on_request: called as `wire.Connection.on_request`; None where the peer may not open streams.
        on_lost: called with the session and the reason when it takes no more streams, and again when it is gone.
        address: where the peer is, for error texts; by default what the transport says when it is connected.
        authentication: this end's part in proving that both know the token, or None.
        share: of the loop, among the sessions of one runtime.
        held: bytes of requests, shared by the sessions that a runtime accepts.

    Attributes:
        phase: where it is in its life.
        lost: why it is gone; None in every phase but `LOST`.
        paused: the kernel takes no more for now; output waits in `out` and in the streams.
        heard: something has come since `transport.liveness` looked last.
        missed_checks: how many checks of `transport.liveness` found nothing new while something was waited for; below 0
            while nothing is.
        acceptance: handlers that have not begun.
        unsent: ids of the streams whose request has not left this process, or not all of it.
        hint_before_hello: what to add to the reason where the connection is lost before the hellos are exchanged.
        turned_away: it was ended for what the peer did, or was, before the hellos were exchanged.
        refused: why it is broken off as soon as it is connected; a listener sets it that has too many sessions.
        possibly_incomplete: it was lost, and the peer may have said more than has arrived. Where it is False, the peer
            has begun no request that it did not accept.
    """

    stream_type = Stream

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        hello: Hello,
        *,
        window: int,
        session_window: int,
        hello_timeout_s: float,
        host_timeout_s: float = HOST_S,
        on_request: OnRequest[Stream] | None,
        on_lost: Callable[[Session, str], None],
        address: str = "",
        authentication: Authentication | None = None,
        share: FairShare | None = None,
        held: ByteBudget | None = None,
    ) -> None:
        super().__init__(hello, window, session_window, authentication)
        self.loop = loop
        self.address = address
        self.phase = Phase.GREETING
        self.lost: str | None = None
        self.paused = self.heard = self._scheduled = False
        self.missed_checks = -1
        self.acceptance = Acceptance()
        self.unsent: set[int] = set()  # bounded by the streams
        self.hint_before_hello = ""
        self.turned_away = self.possibly_incomplete = False
        self.refused: str | None = None
        self.held = held
        self.ready: asyncio.Future[None] = loop.create_future()  # the hellos are exchanged
        self.send_limit = hello.max_message
        self._dialled = on_request is None
        if on_request is not None:
            self.on_request = on_request
        self._on_lost = on_lost
        self._hello_timeout_s, self._host_timeout_s = hello_timeout_s, host_timeout_s
        self._share = share or FairShare(loop)
        self._transport: asyncio.Transport | None = None
        self._inbound: Inbound | None = None  # while it is connected: they refer to each other
        self._timer: asyncio.TimerHandle | None = None
        self._resumed: dict[asyncio.Future[None], None] = {}  # in order; at most one a stream or call
        self._pongs: dict[bytes, asyncio.Future[None]] = {}  # by what the PING said: that of liveness, and `PARTING`

    def __repr__(self) -> str:
        return f"<Session {self.address} {self.phase.name.lower()}, {len(self.streams)} streams>"

    @property
    def usable(self) -> bool:
        """New streams may be opened."""
        return self.phase is Phase.OPEN

    @property
    def full(self) -> bool:
        """The peer allows no further stream for now."""
        return self.peer is not None and len(self.streams) >= self.peer.max_streams

    # asyncio.Protocol

    def connection_made(self, transport: Any) -> None:
        own(transport)
        self._transport = transport
        if self.lost is not None:
            transport.abort()
            return
        self._inbound = Inbound(self, transport, self._share, self._dialled)
        self.address = self.address or _name_of(transport)
        tune(transport, self._host_timeout_s)
        # 0: a write goes to the kernel at once, and `paused` means that something did not fit.
        transport.set_write_buffer_limits(high=0)
        words = f"the peer sent no hello within {self._hello_timeout_s:g} s"
        self._timer = self.loop.call_later(self._hello_timeout_s, self.break_off, f.GoawayCode.PROTOCOL, words)
        self.greet()
        self.flush()
        if self.refused is not None:
            self.break_off(f.GoawayCode.BUSY, self.refused)

    def data_received(self, data: bytes) -> None:
        inbound = self._inbound
        if inbound is not None and self.lost is None:
            inbound.serve(data)

    def connection_lost(self, error: Exception | None) -> None:
        inbound, self._inbound = self._inbound, None
        if self.lost is not None:
            return
        reason = f"connection lost: {error}" if error else "the peer closed the connection"
        if isinstance(error, TlsFailed):
            reason = str(error)
            self.turned_away = self.peer is None
        elif self.peer is None:
            reason += self.hint_before_hello
        # An accepting end reads nothing more: it would begin handlers for a client that is gone.
        if self._dialled and self.peer is not None and inbound is not None:
            self.paused = True  # nothing can be written any more
            if not inbound.take_remainder(error):
                self.possibly_incomplete = True
        if self.lost is None:
            self._lose(reason)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.flush()
        if len(self.acceptance):
            self.begin_accepted()
        if self._inbound is not None and not self.paused:
            self._inbound.output_taken()
        if not self.paused:
            for waiter in list(self._resumed):
                if not waiter.done():
                    waiter.set_result(None)

    # sending

    def schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write what waits, as far as the kernel takes it."""
        self._scheduled = False
        if self.paused or self._transport is None or self.lost is not None:
            return
        data = self.take_some()
        if data:
            self._transport.write(data)
        if self._ready:
            self.flush()

    def write_after(self, start: bytes, piece: memoryview) -> None:
        """Write a fragment after the session's own frames that wait, without copying it."""
        # asyncio warns of each further write to a transport that has failed and has not said so yet.
        if self._transport is None or self.lost is not None or self._transport.is_closing():
            return
        self.flush()
        if piece.nbytes < f.SMALL:
            self._transport.write(start + piece)
        else:
            # Two writes: asyncio's writelines forgets to pause its protocol in 3.12.1 and 3.13.0.
            self._transport.write(start)
            self._transport.write(piece)

    async def resumed(self) -> None:
        """Wait until the kernel takes output again, or the session is gone or silent."""
        if self.paused and self.lost is None:
            waiter = self.loop.create_future()
            self._resumed[waiter] = None
            try:
                await waiter
            finally:
                self._resumed.pop(waiter, None)

    # handlers that may begin

    def accept(self, stream: Stream, begin: Callable[[], None]) -> None:
        """The handler of `stream` may begin: tell the peer so, and call `begin` once the kernel has that.

        The handler waits while the kernel takes nothing. Where the stream is closed meanwhile, it never begins.
        """
        self.acceptance.accepted[stream] = begin
        if self._inbound is None or not self._inbound.serving:  # else those of one read are announced together
            self.begin_accepted()

    def begin_accepted(self) -> None:
        """Announce the handlers that may begin, and begin them once the kernel has taken that."""
        acceptance = self.acceptance
        # `resume_writing` comes back to this; the handlers of a lost session do not begin.
        while not self.paused and self.lost is None:
            if not acceptance.accepted:
                acceptance.begin()
                break
            self.announce(acceptance.announce())
            self.flush()

    def withdraw(self, stream: Stream) -> None:
        """`stream` was closed early: its handler does not begin any more."""
        self.acceptance.withdraw(stream)

    # whether the peer lives

    def ping(self, payload: bytes = b"") -> asyncio.Future[None]:
        """Ask for a sign of life. All who ask meanwhile wait for the same answer, so it must not be cancelled.

        Args:
            payload: what the PONG repeats, at most 64 bytes.

        Returns:
            done when the answer is here or the session is gone.
        """
        answer = self._pongs.get(payload)
        if answer is None:
            answer = self.loop.create_future()
            if self.lost is None:
                self._pongs[payload] = answer
                self.send(f.frame(f.PING, 0, payload))
            else:
                answer.set_result(None)
        return answer

    def host_gone(self, timeout_s: float) -> bool:
        """Whether the peer's host has acknowledged nothing for so long although it had to; False where none can say."""
        sock = None if self._transport is None else tcp_socket(self._transport)
        return sock is not None and host_gone(sock, timeout_s)

    @property
    def silent(self) -> bool:
        """The peer has said nothing for long, although it was asked."""
        return self.missed_checks >= SILENT

    def fell_silent(self, words: str) -> None:
        """The peer is silent since now: calls that wait for it may go to another worker."""
        for stream in tuple(self.streams.values()):
            if stream.owner is not None:
                stream.owner.stream_silent(stream, words)
        for waiter in self._resumed:
            if not waiter.done():
                waiter.set_result(None)

    def ask(self) -> None:
        """Find out whether the peer lives, where the transport does not notice by itself as a socket does."""
        ask = getattr(self._transport, "ask", None)
        if ask is not None:
            ask()

    # its end

    def go_away(self, code: int, words: str) -> None:
        """Ask the peer to open no more streams; the open ones go on. One that is not connected yet hears nothing."""
        if self._transport is not None:  # it would be written before the hello
            self.send(f.coded(f.GOAWAY, 0, code, words.encode()))

    def break_off(self, code: int, words: str) -> None:
        """Tell the peer why and close; every open stream fails with these words."""
        if self.lost is not None:
            return
        self.possibly_incomplete = True  # what came after the frame that broke the protocol is not read
        if self.peer is None:
            self.turned_away = True  # the listener's log, or the dialler's error, says so
        else:
            logger.info("session %s closed: %s", self.address, words)
        if self._transport is not None:
            self.out.append(f.coded(f.GOAWAY, 0, code, words.encode()))
            self._transport.write(b"".join(self.out))
            self.out.clear()
        self._lose(words)
        self.close()

    def close(self, reason: str = "the runtime at this end was shut down") -> None:
        """Close the connection once what waits is written; open streams fail with `reason`."""
        if self.lost is None:
            if self._transport is not None and (data := self.take_output()):
                self._transport.write(data)
            self._lose(reason)
        if self._transport is not None:
            if self._transport.get_write_buffer_size():
                # A peer that reads nothing must not keep a closed connection.
                self.loop.call_later(self._hello_timeout_s, self._transport.abort)
            self._transport.close()

    def abandon(self, words: str) -> None:
        """The peer's host is gone: end at once, without a word to it; open streams fail with these."""
        if self.lost is None:
            self.possibly_incomplete = True  # what the peer said last may be lost in the network
            logger.info("session %s closed: %s", self.address, words)
            self._lose(words)
        if self._transport is not None:
            self._transport.abort()

    def _lose(self, reason: str) -> None:
        self.phase = Phase.LOST
        self.lost = f"{reason}, having said: {self.going}" if self.going else reason
        if self.possibly_incomplete and self._dialled:
            # A dialled end queues whole frames, so each begins with its header.
            self.unsent.update(f.HEADER.unpack_from(each)[3] for each in self.out if each[f.KIND_AT] == f.REQUEST)
        if self._timer is not None:
            self._timer.cancel()
        if not self.ready.done():
            self.ready.set_exception(RemoteProtocolError(self.lost))
            self.ready.exception()  # perhaps nothing waits for it
        streams = list(self.streams.values())
        self.streams.clear()
        self._ready.clear()
        for stream in streams:
            stream.state = CLOSED
            stream.lost = self.lost
            stream.outbox.clear()
            stream.let_go()
        self._on_lost(self, self.lost)  # Before the calls: the rotation must not offer them this worker again.
        if self._dialled:
            for stream in streams:
                stream.on_closed()
        else:
            self._share.end(streams)
        for waiter in (*self._resumed, *self._pongs.values()):  # what waits sees `lost`
            if not waiter.done():
                waiter.set_result(None)
        self._pongs.clear()

    # receiving, see `Connection`

    def on_hello(self, peer: Hello) -> None:
        self.phase = Phase.OPEN
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.send_limit = min(self.send_limit, peer.max_message)
        if not self.ready.done():
            self.ready.set_result(None)

    def on_goaway(self, code: int, words: str) -> None:
        self.phase = Phase.GOING
        if code == f.GoawayCode.DRAINING:
            self._on_lost(self, words)
        else:
            self.loop.call_soon(self.close, "the peer closed the session")

    def on_pong(self, payload: bytes) -> None:
        waiter = self._pongs.pop(payload, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


async def part(session: Session) -> None:
    """Wait until the peer of a session has read everything that was sent, or the session is gone.

    Bytes that the kernel has are not at the peer: it loses them when it writes to a connection that was closed here. So
    it is asked for a PONG after them, for `PART_S` seconds from when the kernel has them all.
    """
    if session.phase is Phase.GREETING:
        return  # it has no streams, and perhaps no transport yet
    session.flush()
    while session.lost is None and (session.paused or session.out or session._ready):
        await session.resumed()
        session.flush()
    if session.lost is None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PART_S):
                await asyncio.shield(session.ping(PARTING))


def _name_of(transport: Any) -> str:
    name = transport.get_extra_info("peername")
    if not isinstance(name, tuple) or len(name) < 2:
        return "a client"
    return str(Address("tcp", name[0].removeprefix("::ffff:"), name[1]))  # IPv4 through a socket that takes both
