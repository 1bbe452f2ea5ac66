"""A session on an event loop: joins `wire.connection` to an asyncio transport.

`transport.inbound` reads its bytes, and `transport.acceptance` holds the handlers that may begin.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from enum import IntEnum
from typing import Any

from triton_distributed.compiled import mypyc_attr
from triton_distributed.errors import RemoteProtocolError
from triton_distributed.system.fork import own
from triton_distributed.system.unix_sockets import set_buffer
from triton_distributed.transport.acceptance import Acceptance
from triton_distributed.transport.address import Address
from triton_distributed.transport.fairness import FairShare
from triton_distributed.transport.host_loss import host_gone
from triton_distributed.transport.inbound import Inbound, Reader
from triton_distributed.transport.liveness import SILENT
from triton_distributed.transport.shared_memory import SessionMemory
from triton_distributed.transport.shared_pool import SharedPool
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

# A peer has this many seconds to confirm that it has read everything: a stopped peer must not delay a shutdown long.
PART_S = 5.0
PARTING = b"the last"  # payload of the PING that asks for this


class Phase(IntEnum):
    """The phase of a session's life; it only goes forward."""

    GREETING = 0  # not connected, or the hellos are not exchanged
    OPEN = 1
    GOING = 2  # the peer accepts no more streams; open streams go on
    LOST = 3  # the connection is gone, and no stream is open


@mypyc_attr(allow_interpreted_subclasses=True)
class Session(Reader):
    """One end of a session.

    Args:
        loop: the running loop.
        hello: this end's hello.
        window: bytes that one stream may have unread.
        session_window: bytes that all streams together may have unread.
        hello_timeout_s: seconds that the peer has for its hello.
        host_timeout_s: seconds after which a TCP connection to an unreachable host is given up.
        on_request: called like `wire.Connection.on_request`; None if the peer may not open streams.
        on_lost: called with session and reason when the peer accepts no more streams, and again when it is lost.
        address: the peer's address, for error texts; by default the address that the transport reports.
        authentication: this end's part in the authentication, or None.
        share: the session's share of the loop, among all sessions of one runtime.
        held: the budget for bytes of requests, shared by the sessions that a runtime accepts.
        shared: the runtime's shared memory; None to use none.

    Attributes:
        connection: the session's protocol, without I/O.
        streams: its open streams by id.
        max_streams: the peer's limit of open streams; 0 before its hello.
        phase: the phase of its life.
        lost: why it was lost; None in every phase but `LOST`.
        cut: the number of streams that were open when it was lost.
        paused: the kernel accepts no output for now; output waits in `out` and in the streams.
        waiters: the futures of those that wait until the kernel accepts output, oldest first.
        heard: something has arrived since the last check of `transport.liveness`.
        missed_checks: checks of `transport.liveness` in a row that found nothing new while streams were open; negative
            without streams.
        acceptance: handlers that have not begun.
        memory: its part in shared memory; None to use none.
        unsent: ids of the streams whose request has not left this process completely.
        hint_before_hello: text to add to the reason if the connection is lost before the hellos are exchanged.
        turned_away: it was rejected before the hellos were exchanged.
        refused: why it is broken off as soon as it is connected; set by a listener at its limit.
        possibly_incomplete: it was lost, and the peer may have sent more than has arrived. If False, each handler
            that began at the peer was announced by an ACCEPT that arrived here.
    """

    cut: int = 0  # An attribute of the instance only when the session is lost: it has 29 others.

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        hello: Hello,
        *,
        window: int,
        session_window: int,
        hello_timeout_s: float,
        host_timeout_s: float,
        on_request: OnRequest[Stream] | None,
        on_lost: Callable[[Session, str], None],
        address: str = "",
        authentication: Authentication | None = None,
        share: FairShare | None = None,
        held: ByteBudget | None = None,
        shared: SharedPool | None = None,
    ) -> None:
        connection: Connection[Stream] = Connection(self, Stream, hello, window, session_window, authentication)
        connection.held = held
        if on_request is not None:
            connection.on_request = on_request
        self.connection = connection
        self.streams = connection.streams
        self.loop = loop
        self.address = address
        self.phase = Phase.GREETING
        self.lost: str | None = None
        self.paused = self.heard = self._scheduled = False
        self.missed_checks = -1
        self.acceptance = Acceptance()
        self.memory = None if shared is None else SessionMemory(loop, shared, connection)
        self.unsent: set[int] = set()  # bounded by the streams
        self.hint_before_hello = ""
        self.turned_away = self.possibly_incomplete = False
        self.refused: str | None = None
        self.ready: asyncio.Future[None] = loop.create_future()  # done when the hellos are exchanged
        self.send_limit = hello.max_message
        self.max_streams = 0
        self._dialled = on_request is None
        self._on_lost = on_lost
        self._timeouts_s = hello_timeout_s, host_timeout_s
        self._share = share or FairShare(loop)
        self._transport: asyncio.Transport | None = None
        self._inbound: Inbound | None = None  # only while connected: the two refer to each other
        self._timer: asyncio.TimerHandle | None = None
        self.waiters: dict[asyncio.Future[None], None] = {}  # At most one for each stream or call.
        self._pongs: dict[bytes, asyncio.Future[None]] = {}  # by the PING's payload: empty for liveness, or `PARTING`

    def __repr__(self) -> str:
        return f"<Session {self.address} {self.phase.name.lower()}, {len(self.streams)} streams>"

    @property
    def usable(self) -> bool:
        """Whether new streams may be opened."""
        return self.phase is Phase.OPEN

    @property
    def full(self) -> bool:
        """Whether the peer's limit of open streams is reached."""
        return len(self.streams) >= self.max_streams

    # asyncio.Protocol

    def connection_made(self, transport: Any) -> None:
        own(transport)
        self._transport = transport
        if self.lost is not None:
            transport.abort()
            return
        self._inbound = Inbound(self, transport, self._share, self._dialled)
        self.address = self.address or _name_of(transport)
        hello_timeout_s, host_timeout_s = self._timeouts_s
        tune(transport, host_timeout_s)
        set_buffer(transport, short=False)
        # 0: a write goes to the kernel at once, and `paused` means that some output did not fit.
        transport.set_write_buffer_limits(high=0)
        words = f"the peer sent no hello within {hello_timeout_s:g} s"
        self._timer = self.loop.call_later(hello_timeout_s, self.break_off, f.GoawayCode.PROTOCOL, words)
        self.connection.greet()
        self.flush()
        if self.refused is not None:
            self.break_off(f.GoawayCode.BUSY, self.refused)

    def data_received(self, data: bytes) -> None:
        inbound = self._inbound
        if inbound is not None and self.lost is None:
            inbound.serve(data)

    def connection_lost(self, error: Exception | None) -> None:
        inbound, self._inbound = self._inbound, None
        if self.lost is None:
            self._disconnected(error, inbound)
        if inbound is not None:
            inbound.bulk = None  # The reader refers to the inbound, and to a message that may be large.

    def _disconnected(self, error: Exception | None, inbound: Inbound | None) -> None:
        reason = f"connection lost: {error}" if error else "the peer closed the connection"
        if isinstance(error, TlsFailed):
            reason = str(error)
            self.turned_away = self.connection.peer is None
        elif self.connection.peer is None:
            reason += self.hint_before_hello
        # An accepting end reads nothing more: it would begin handlers for a client that has left.
        if self._dialled and self.connection.peer is not None and inbound is not None:
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
            for waiter in list(self.waiters):
                if not waiter.done():
                    waiter.set_result(None)

    # sending

    def schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write the waiting output, as far as the kernel accepts it."""
        self._scheduled = False
        if self.paused or self._transport is None or self.lost is not None:
            return
        data = self.connection.take_some()
        if data:
            self._share.sent += len(data)
            self._transport.write(data)
        if self.connection.ready:  # that was not all
            self.flush()

    def write_after(self, start: bytes, piece: memoryview) -> None:
        """Write a fragment after the session's waiting frames, without copying it."""
        # asyncio warns about each further write to a transport that has failed but not yet reported it.
        if self._transport is None or self.lost is not None or self._transport.is_closing():
            return
        self.flush()
        pace = self.connection.pace
        if pace.short is self.connection.calm:
            pace.short = not pace.short
            set_buffer(self._transport, pace.short)
        self._share.sent += len(start) + piece.nbytes
        if piece.nbytes < f.SMALL:
            self._transport.write(start + piece)
        else:
            # Two writes: asyncio's writelines forgets to pause its protocol in 3.12.1 and 3.13.0.
            self._transport.write(start)
            self._transport.write(piece)

    async def resumed(self) -> None:
        """Wait until the kernel accepts output again, or the session is lost or silent."""
        if self.paused and self.lost is None:
            waiter = self.loop.create_future()
            self.waiters[waiter] = None
            try:
                await waiter
            finally:
                self.waiters.pop(waiter, None)

    # handlers that may begin

    def accept(self, stream: Stream, begin: Callable[[], None]) -> None:
        """Announce to the peer that the handler of `stream` begins; call `begin` once the kernel has the ACCEPT.

        The handler waits while the kernel accepts no output. If the stream is closed meanwhile, it never begins.
        """
        self.acceptance.accepted[stream] = begin
        if self._inbound is None or not self._inbound.serving:  # else all handlers of one read are announced together
            self.begin_accepted()

    def begin_accepted(self) -> None:
        """Announce the handlers that may begin, and begin them once the kernel has the ACCEPT."""
        acceptance = self.acceptance
        # `resume_writing` calls this again; the handlers of a lost session do not begin.
        while not self.paused and self.lost is None:
            if not acceptance.accepted:
                acceptance.begin()
                break
            self.connection.announce(acceptance.announce())
            self.flush()

    def withdraw(self, stream: Stream) -> None:
        """Drop a handler that has not begun: `stream` was closed early."""
        self.acceptance.withdraw(stream)

    # whether the peer lives

    def ping(self, payload: bytes = b"") -> asyncio.Future[None]:
        """Send a PING. Callers with the same payload share one future, so it must not be cancelled.

        Args:
            payload: bytes that the PONG returns, at most 64.

        Returns:
            a future that is done when the PONG has arrived or the session is lost.
        """
        answer = self._pongs.get(payload)
        if answer is None:
            answer = self.loop.create_future()
            if self.lost is None:
                self._pongs[payload] = answer
                self.connection.send(f.frame(f.PING, 0, payload))
            else:
                answer.set_result(None)
        return answer

    def host_gone(self, timeout_s: float) -> bool:
        """Return whether the peer's host acknowledged nothing for this long, although it had to; False if unknown."""
        sock = None if self._transport is None else tcp_socket(self._transport)
        return sock is not None and host_gone(sock, timeout_s)

    @property
    def silent(self) -> bool:
        """Whether the peer has not answered a PING for long."""
        return self.missed_checks >= SILENT

    def fell_silent(self, words: str) -> None:
        """Tell all streams that the peer fell silent: calls that wait for it may go to another worker."""
        for stream in tuple(self.streams.values()):
            if stream.owner is not None:
                stream.owner.stream_silent(stream, words)
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(None)

    def ask(self) -> None:
        """Check whether the peer is alive, if the transport does not detect its end as a socket does."""
        ask = getattr(self._transport, "ask", None)
        if ask is not None:
            ask()

    # its end

    def go_away(self, code: int, words: str) -> None:
        """Ask the peer to open no more streams; open streams go on. No effect before the session is connected."""
        if self._transport is not None:  # else GOAWAY would be written before the hello
            self.connection.send(f.coded(f.GOAWAY, 0, code, words.encode()))

    def break_off(self, code: int, words: str) -> None:
        """Send the peer the reason and close; every open stream fails with it."""
        if self.lost is not None:
            return
        self.possibly_incomplete = True  # bytes after the frame that broke the protocol are not read
        if self.connection.peer is None:
            self.turned_away = True  # the listener's log, or the dialer's error, reports it
        else:
            logger.info("session %s closed: %s", self.address, words)
        if self._transport is not None:
            self.connection.out.append(f.coded(f.GOAWAY, 0, code, words.encode()))
            self._transport.write(b"".join(self.connection.out))
            self.connection.out.clear()
        self._lose(words)
        self.close()

    def close(self, reason: str = "the runtime at this end was shut down") -> None:
        """Close the connection after the waiting output is written; open streams fail with `reason`."""
        if self.lost is None:
            if self._transport is not None and (data := self.connection.take_output()):
                self._transport.write(data)
            self._lose(reason)
        if self._transport is not None:
            if self._transport.get_write_buffer_size():
                # A peer that reads nothing must not keep a closed connection.
                self.loop.call_later(self._timeouts_s[0], _abort, self)
            self._transport.close()

    def abandon(self, words: str) -> None:
        """End at once, because the peer's host is gone; nothing is sent, and open streams fail with `words`."""
        if self.lost is None:
            self.possibly_incomplete = True  # the peer's last bytes may be lost in the network
            logger.info("session %s closed: %s", self.address, words)
            self._lose(words)
        if self._transport is not None:
            self._transport.abort()

    def _lose(self, reason: str) -> None:
        self.phase = Phase.LOST
        connection, going = self.connection, self.connection.going
        self.lost = f"{reason}, having said: {going}" if going else reason
        if self.possibly_incomplete and self._dialled:
            # A dialled end queues whole frames, so each entry begins with a header.
            self.unsent.update(f.HEADER.unpack_from(each)[3] for each in connection.out if each[f.KIND_AT] == f.REQUEST)
        if self._timer is not None:
            self._timer.cancel()
        if not self.ready.done():
            self.ready.set_exception(RemoteProtocolError(self.lost))
            self.ready.exception()  # marks it as retrieved, since perhaps nothing awaits it
        streams = connection.over()
        if self.memory is not None:
            self.memory.lost()
        for stream in streams:
            stream.state = CLOSED
            stream.lost = self.lost
            stream.outbox.clear()
            stream.let_go()
        self.cut = len(streams)
        self._on_lost(self, self.lost)  # before the calls: the rotation must not offer them this worker again
        if self._dialled:
            for stream in streams:
                try:
                    stream.on_closed()
                except Exception:  # The other streams must know, too.
                    logger.exception("session %s: closing stream %d failed", self.address, stream.id)
        else:
            self._share.end(streams)
        for waiter in (*self.waiters, *self._pongs.values()):  # they find `lost` set
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
        if self.memory is not None:
            self.memory.begin(self._transport)
        self.max_streams = peer.max_streams
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
    """Wait until the peer of a session has read everything that was sent, or the session is lost.

    Bytes in the kernel may not be at the peer yet; a peer loses them if it writes to a connection that is closed here.
    So this sends a PING after them, and waits for the PONG for `PART_S` seconds from when the kernel has all bytes.
    """
    if session.phase is Phase.GREETING:
        return  # it has no streams, and perhaps no transport yet
    session.flush()
    while session.lost is None and (session.paused or session.connection.out or session.connection.ready):
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
    return str(Address("tcp", name[0].removeprefix("::ffff:"), name[1]))  # IPv4 through a dual-stack socket


def _abort(session: Session) -> None:
    """Abort the transport of a closed session if it is still connected."""
    if session._inbound is not None and session._transport is not None:
        session._transport.abort()
