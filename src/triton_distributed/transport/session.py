"""A session on an event loop: wire.connection joined to an asyncio transport. What comes in is `transport.inbound`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from triton_distributed.errors import RemoteProtocolError
from triton_distributed.system.fork import own
from triton_distributed.transport.address import Address
from triton_distributed.transport.fairness import UNLIMITED, Turns
from triton_distributed.transport.host_loss import host_gone
from triton_distributed.transport.inbound import Intake
from triton_distributed.transport.leftovers import read_remainder
from triton_distributed.transport.liveness import HOST_S, SILENT
from triton_distributed.transport.tcp import tcp_socket, tune
from triton_distributed.transport.tls import TlsFailed
from triton_distributed.wire import frames as f
from triton_distributed.wire.authentication import Authentication
from triton_distributed.wire.hello import Hello
from triton_distributed.wire.states import CLOSED
from triton_distributed.wire.window import Held

logger = logging.getLogger("triton_distributed.transport")

PART_S = 5.0  # what a peer has to say that it has read everything: one that is stopped does not hold up a shutdown
PARTING = b"the last"


class Session(Intake):
    """One end of a session.

    Args:
        loop: the running loop.
        hello: what this end says of itself.
        window: bytes that one stream may have unread.
        session_window: bytes that all streams together may.
        hello_timeout_s: seconds that the peer has for its hello.
        host_timeout_s: seconds after which a TCP connection to a host that is gone is given up.
        on_request: called as `wire.Connection.on_request`; None where the peer may not open streams.
        on_lost: called with the session and the reason when it takes no more streams, and again when it is gone.
        authentication: this end's part in proving that both know the token, or None.
        turns: shared by the sessions of one runtime.
        held: shared by those that it accepts.

    Attributes, beside those of `Intake`:
        address: where the peer is, for error texts; by default what the transport says when it is connected.
        early: what to add to the reason where the connection is lost before the hellos are exchanged.
        turned_away: it was ended for what the peer did, or was, before the hellos were exchanged.
        refused: why it is broken off as soon as it is connected; set by a listener that has too many.
        torn: it was lost, and the peer may have said more than has arrived. Where it is not, the peer has begun no
            request that it did not accept.
        quiet: how often `transport.liveness` has looked since something came and while something was waited for; below
            0: nothing is.
        unsent: ids of the streams whose request has not left this process, or not all of it.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        hello: Hello,
        *,
        window: int,
        session_window: int,
        hello_timeout_s: float,
        host_timeout_s: float = HOST_S,
        on_request: Callable[..., None] | None,
        on_lost: Callable[[Session, str], None],
        address: str = "",
        authentication: Authentication | None = None,
        turns: Turns | None = None,
        held: Held | None = None,
    ) -> None:
        dialled = on_request is None
        super().__init__(loop, hello, window, session_window, authentication, turns or Turns(loop), dialled)
        self.address = address
        self.early = ""
        self.turned_away = False
        self.refused: str | None = None
        self.torn = self._scheduled = False
        self.held = held
        self.quiet = -1
        self.unsent: set[int] = set()  # bounded by the streams
        self.ready: asyncio.Future[None] = loop.create_future()  # the hellos are exchanged
        self.send_limit = hello.max_message
        if on_request is not None:
            self.on_request = on_request  # type: ignore[method-assign]
        self._on_lost = on_lost
        self._hello_timeout_s, self._host_timeout_s = hello_timeout_s, host_timeout_s
        self._answer: asyncio.Future[None] | None = None  # to the PING that is under way
        self._timer: asyncio.TimerHandle | None = None
        self._resumed: dict[asyncio.Future[None], None] = {}  # in order; at most one a stream or call
        self._parted: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        state = "lost" if self.lost else "going" if self.going else "open" if self.peer else "greeting"
        return f"<Session {self.address} {state}, {len(self.streams)} streams>"

    @property
    def usable(self) -> bool:
        """New streams may be opened."""
        return self.lost is None and self.going is None and self.peer is not None

    @property
    def full(self) -> bool:
        """The peer allows no further stream for now."""
        return self.peer is not None and len(self.streams) >= self.peer.max_streams

    # asyncio.Protocol

    def connection_made(self, transport: Any) -> None:
        own(transport)
        self._transport = transport
        self._pauses = getattr(transport, "reads_in_place", True)
        if not self._pauses:
            self._turns = Turns(self.loop, limited=False)
        if self.lost is not None:
            transport.abort()
            return
        self.address = self.address or _name_of(transport)
        tune(transport, self._host_timeout_s)
        # 0: a write goes to the kernel at once, and `paused` means that something did not fit.
        transport.set_write_buffer_limits(high=0)
        self._timer = self.loop.call_later(self._hello_timeout_s, self._no_hello)
        self.greet()
        self.flush()
        if self.refused is not None:
            self.break_off(f.GoawayCode.BUSY, self.refused)

    def eof_received(self) -> None:
        return None

    def connection_lost(self, error: Exception | None) -> None:
        if self.lost is not None:
            return
        reason = f"connection lost: {error}" if error else "the peer closed the connection"
        if isinstance(error, TlsFailed):
            reason = str(error)
            self.turned_away = self.peer is None
        elif self.peer is None:
            reason += self.early
        # An accepting end reads nothing more: it would begin handlers for a client that is gone.
        if self._dialled and self.peer is not None:
            self.paused = True  # nothing can be written any more
            if self.holding:
                self._serve(b"", UNLIMITED)
            if error is not None and self.lost is None:
                self.torn = isinstance(error, TlsFailed) or not read_remainder(self, self._transport, error)
        if self.lost is None:
            self._lose(reason)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.flush()
        if (self._beginning or self._told) and not self.paused:
            self._begin()
        if self._choked and not self.paused:
            self._choked = False
            self._wait()
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
        self._scheduled = False
        if self.paused or self._transport is None or self.lost is not None:
            return
        data = self.take_some()
        if data:
            self._transport.write(data)
        if self._ready:
            self.flush()

    async def parted(self) -> None:
        """Wait until the peer has read everything that was sent, or the session is gone.

        Bytes that the kernel has are not at the peer: it loses them when it writes to a connection that was closed
        here. So it is asked for a PONG behind them, for `PART_S` seconds from when the kernel has them all.
        """
        if self.peer is None:
            return  # it has no streams, and perhaps no transport yet
        self.flush()
        # Between its accept and `connection_made` there is no transport, and nothing that the peer could have asked.
        while self.lost is None and self._transport is not None and (self.paused or self.out or self._ready):
            await self.resumed()
            self.flush()
        if self.lost is None:
            self._parted = self.loop.create_future()
            self.send(f.frame(f.PING, 0, PARTING))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PART_S):
                    await self._parted

    def write_behind(self, start: bytes, piece: memoryview) -> None:
        """Write a fragment behind the session's own frames that wait, without copying it."""
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

    def ping(self) -> asyncio.Future[None]:
        """Ask for a sign of life. Not to be cancelled: whoever asks meanwhile waits for the same answer.

        Returns:
            done when the answer is here or the session is gone.
        """
        answer = self._answer
        if answer is None or answer.done():
            answer = self._answer = self.loop.create_future()
            if self.lost is None:
                self.send(f.frame(f.PING, 0))
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
        return self.quiet >= SILENT

    def fell_silent(self, words: str) -> None:
        """It is silent since now: whoever waits for it may look for somebody else."""
        for stream in tuple(self.streams.values()):
            if stream.owner is not None:
                stream.owner.stream_silent(stream, words)
        for waiter in self._resumed:
            if not waiter.done():
                waiter.set_result(None)

    # its end

    def go_away(self, code: int, words: str) -> None:
        """Ask the peer to open no more streams; the open ones go on. One that is not connected yet hears nothing."""
        if self._transport is not None:  # it would be written before the hello
            self.send(f.coded(f.GOAWAY, 0, code, words.encode()))

    def ask(self) -> None:
        """Find out whether the peer lives, where the transport is not told: a socket is."""
        ask = getattr(self._transport, "ask", None)
        if ask is not None:
            ask()

    def break_off(self, code: int, words: str) -> None:
        """Tell the peer why and close; every open stream fails with these words."""
        if self.lost is not None:
            return
        self.torn = True  # what came behind the frame that broke the protocol is not read
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
            self.torn = True  # what it said last may be lost in the network
            logger.info("session %s closed: %s", self.address, words)
            self._lose(words)
        if self._transport is not None:
            self._transport.abort()

    def _no_hello(self) -> None:
        self.break_off(f.GoawayCode.PROTOCOL, f"the peer sent no hello within {self._hello_timeout_s:g} s")

    def _lose(self, reason: str) -> None:
        going = self.going
        self.lost = f"{reason}, having said: {going[1]}" if going and going[1] else reason
        if self.torn and self._dialled:  # a dialled end queues whole frames, so each begins with its header
            self.unsent.update(f.HEADER.unpack_from(each)[3] for each in self.out if each[f.KIND_AT] == f.REQUEST)
        if self._timer is not None:
            self._timer.cancel()
        if not self.ready.done():
            self.ready.set_exception(RemoteProtocolError(self.lost))
            self.ready.exception()  # nobody may be waiting
        streams = list(self.streams.values())
        self.streams.clear()
        self._ready.clear()
        for stream in streams:
            stream.state = CLOSED
            stream.lost = self.lost
            stream.outbox.clear()
            stream.let_go()
        if self._dialled:
            for stream in streams:
                stream.on_closed()
        else:
            self._turns.end(streams)
        for waiter in (*self._resumed, self._parted, self._answer):  # who waits sees what became of it
            if waiter is not None and not waiter.done():
                waiter.set_result(None)
        self._on_lost(self, self.lost)

    # receiving

    def on_hello(self, peer: Hello) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.send_limit = min(self.send_limit, peer.max_message)
        if not self.ready.done():
            self.ready.set_result(None)

    def on_request(self, stream: Any, *request: Any) -> None:
        raise RemoteProtocolError("this end takes no requests")

    def on_goaway(self, code: int, words: str) -> None:
        if code == f.GoawayCode.DRAINING:
            self._on_lost(self, words)
        else:
            self.loop.call_soon(self._gone, words)

    def on_pong(self, payload: bytes) -> None:
        waiter = self._parted if payload == PARTING else self._answer
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _gone(self, words: str) -> None:
        if self.lost is None:
            self._lose("the peer closed the session")
            self.close()


def _name_of(transport: Any) -> str:
    name = transport.get_extra_info("peername")
    if not isinstance(name, tuple) or len(name) < 2:
        return "a client"
    return str(Address("tcp", name[0].removeprefix("::ffff:"), name[1]))  # IPv4 through a socket that takes both
