"""Connections of the simulated network: delayed, cut into any pieces, reset, truncated, garbled.

A direction of a connection is what the sender's transport still holds, a kernel's buffer of limited size, and arrivals:
each brings some of what the buffer holds, after a time of its own, to the receiver.

Two kinds of connection, as there are two in the world. What a Unix socket has taken reaches the peer, whatever happens
to the sender. On TCP a reset loses what is under way: then `complete` is False at the end that may have missed
something.

A real network garbles no bytes that its checksums would not find, and the wire has none of its own. So what is garbled
here begins with the header of a frame, as after a program's own fault, and can always be told from a frame.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Any

from harness.simulated.hosts import Host, HostsLoop
from triton_distributed.wire.frames import HEADER, HEADER_BYTES

READ_BYTES = 256 * 1024  # delivered at once, as a socket would


class End(asyncio.Transport):
    """One end of a link, and the direction in which it sends.

    Attributes:
        complete: all that the other end ever sent has arrived before this end was told of its loss.
        reads_in_place: see `transport.bulk_reader`.
    """

    reads_in_place = False

    def __init__(self, link: Link, host: Host, protocol: asyncio.Protocol | None, room: int) -> None:
        super().__init__()
        self.link = link
        self.host = host
        self.protocol = protocol
        self.peer: End
        self.complete = True
        self._held: deque[bytes] = deque()  # what the kernel has not taken; the writer is paused meanwhile
        self._held_bytes = 0
        self._kernel = bytearray()
        self._room = room
        self._paused = self._closing = self._lost = False
        self._arriving = False  # an arrival is under way
        self._fin = False  # nothing is sent any more
        self._fin_error: Exception | None = None
        self._fin_told = False
        self._left: int | None = None  # bytes until it is truncated
        self._garble_in: int | None = None  # bytes until the next frame is garbled
        self._frame_left = 0  # bytes until the next header

    def __repr__(self) -> str:
        return f"<End {self.link.number} of {self.host.name}>"

    # asyncio.Transport

    def write(self, data: Any) -> None:
        if self._closing or self._lost or not data:
            return
        if self._fin:
            if not self.link.tcp and self is self.link.accepted:
                self.lose(BrokenPipeError("Broken pipe"))  # before a handler begins whose ACCEPT this was
            return
        data = self._garbled(bytes(data))
        self._held.append(data)
        self._held_bytes += len(data)
        self._fill()
        if self._held and not self._paused:
            self._paused = True
            assert self.protocol is not None
            self.protocol.pause_writing()

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            if not self._held:
                self._closed()

    def abort(self) -> None:
        self._closing = True
        self._drop_held()
        self._closed()

    def is_closing(self) -> bool:
        return self._closing or self._lost

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """The session asks for 0, and 0 it is."""

    def get_write_buffer_size(self) -> int:
        return self._held_bytes

    def get_protocol(self) -> asyncio.BaseProtocol:
        assert self.protocol is not None
        return self.protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    # its way

    def start(self, protocol: asyncio.Protocol) -> None:
        """This end is connected."""
        self.protocol = protocol
        self._soon(self._made)

    def _made(self) -> None:
        assert self.protocol is not None
        self.protocol.connection_made(self)
        self.peer.move()

    def _soon(self, what: Callable[..., object], *arguments: Any) -> None:
        self.host.loop.call_soon(what, *arguments, context=self.host.context)

    def _fill(self) -> None:
        """Give the kernel what it has room for."""
        held, kernel = self._held, self._kernel
        while held and len(kernel) < self._room:
            data = held.popleft()
            taken = self._room - len(kernel)
            if len(data) > taken:
                held.appendleft(data[taken:])
                data = data[:taken]
            self._held_bytes -= len(data)
            kernel += data
        self.move()

    def move(self, soon: bool = False) -> None:
        """See to it that what the kernel has, or the end of it, arrives."""
        waiting = self._kernel or (self._fin and not self._fin_told)
        if self._arriving or not waiting or self.peer.protocol is None:
            return
        self._arriving = True
        loop, delay = self.host.loop, self.link.delay_s(soon)
        loop.call_at(loop.time() + delay, self._arrive, context=self.peer.host.context)

    def _arrive(self) -> None:
        """Some of it is at the peer. Runs as the peer's."""
        self._arriving = False
        kernel, peer, link = self._kernel, self.peer, self.link
        size = link.piece(len(kernel))
        cut = self._left is not None and size >= self._left
        if cut:
            size = self._left or 0
        elif self._left is not None:
            self._left -= size
        data = bytes(kernel[:size])
        del kernel[:size]
        if data:
            link.note(self, f"{size} bytes")
            if not peer.is_closing():
                assert peer.protocol is not None
                peer.protocol.data_received(data)
            elif link.tcp and not self._lost:
                self._refused()
        if cut:
            kernel.clear()
            link.reset("truncated")
            return
        if self._held:
            self._fill()
            if not self._held:
                self._soon(self._emptied)
        if kernel:
            self.move(soon=True)
        elif self._fin and not self._fin_told and not self._held:
            self._fin_told = True
            link.note(self, "end")
            peer.lose(self._fin_error)

    def _emptied(self) -> None:
        if self._held:
            return
        if self._closing:
            self._closed()
        elif self._paused and not self._lost:
            self._paused = False
            assert self.protocol is not None
            self.protocol.resume_writing()

    def _refused(self) -> None:
        """The peer closed before it read this, so its kernel answers with a reset, and what it had sent may be lost."""
        self._kernel.clear()
        self._drop_held()
        self.peer.lose_some(ConnectionResetError("the peer reset the connection"))

    def lose_some(self, error: Exception) -> None:
        """What this end has sent and is not there yet arrives in part, and then `error`."""
        if self._fin_told:
            return
        if self._kernel:
            del self._kernel[self.link.rng.randrange(len(self._kernel) + 1) :]
        self._drop_held()
        self.peer.complete = False
        self._fin, self._fin_error = True, error
        self.move()

    def lose(self, error: Exception | None) -> None:
        """The connection is gone for this end."""
        if self._lost:
            return
        self._lost = True
        self._drop_held()
        if not self._fin:
            self._fin = True
            self.move()
        if self.protocol is not None:
            self._soon(self.protocol.connection_lost, error)
        self.link.left(self)

    def _closed(self) -> None:
        """All is written that will be."""
        if not self._lost:
            self.lose(None)

    def _drop_held(self) -> None:
        self._held.clear()
        self._held_bytes = 0

    @property
    def lost(self) -> bool:
        """Its protocol was told, or will be, that the connection is gone."""
        return self._lost

    # what goes wrong

    def kill(self) -> None:
        """The process is gone; its kernel sends what it has."""
        if self._lost:
            return
        self._drop_held()
        if self.peer._kernel and not self._fin:  # unread here
            self._fin_error = ConnectionResetError("Connection reset by peer")
            self.peer.complete = not self.link.tcp
        self.lose(None)

    def refuse(self) -> None:
        """No process is at this end, and none will be."""
        self.lose(None)
        self.peer.lose(ConnectionResetError("Connection reset by peer"))

    def hang_up(self, error: Exception | None) -> None:
        """Send nothing more; what the kernel has arrives, and then the end."""
        self._drop_held()
        self._fin, self._fin_error = True, error
        self.move()

    def truncate(self, amount: int) -> None:
        """End the connection after another `amount` bytes in this direction; some of what was sent is lost then."""
        self.link.tcp = True
        self._left = amount

    def garble(self, amount: int) -> None:
        """Let the first frame after another `amount` bytes, and all after it, arrive as noise."""
        self._garble_in = amount

    def mend(self) -> None:
        """Carry everything again, unless it is garbled already."""
        self._left = None
        if self._garble_in:
            self._garble_in = None

    def _garbled(self, data: bytes) -> bytes:
        """Follow the frames; what is due is overwritten from the next header on."""
        if self._garble_in == 0:
            return b"\xff" * len(data)
        at = self._frame_left
        while at < len(data):
            if self._garble_in is not None and at >= self._garble_in:
                self._garble_in = 0
                self.link.note(self, "garbled")
                return data[:at] + b"\xff" * (len(data) - at)
            if len(data) - at < HEADER_BYTES:  # not of our protocol
                at = len(data)
                break
            at += HEADER_BYTES + HEADER.unpack_from(data, at)[0]
        self._frame_left = at - len(data)
        if self._garble_in:
            self._garble_in = max(1, self._garble_in - len(data))
        return data


class Link:
    """One connection.

    Args:
        number: for the trace.
        loop: the loop.
        rng: of everything that is left to chance.
        dialler: the host that dials.
        protocol: of the end that dials.
        acceptor: the host that listens.
        tcp: whether a reset loses what is under way.
        forget: called when both ends are gone.
    """

    def __init__(
        self,
        number: int,
        loop: HostsLoop,
        rng: random.Random,
        dialler: Host,
        protocol: asyncio.Protocol,
        acceptor: Host,
        *,
        tcp: bool,
        forget: Callable[[Link], object],
    ) -> None:
        self.number = number
        self.rng = rng
        self.tcp = tcp
        self._loop = loop
        self._forget = forget
        room = int(2 ** (12 + rng.random() * 6))
        self.dialled = End(self, dialler, None, room)
        self.accepted = End(self, acceptor, None, room)
        self.dialled.peer, self.accepted.peer = self.accepted, self.dialled
        self.dialled.start(protocol)

    @property
    def ends(self) -> tuple[End, End]:
        """The end that dialled, and the other."""
        return self.dialled, self.accepted

    def delay_s(self, soon: bool) -> float:
        """How long the next piece is under way, seconds: mostly short, at times much longer."""
        rng = self.rng
        delay = rng.random() * 0.0005
        if not soon:
            chance = rng.random()
            if chance < 0.05:
                delay += rng.random() * 0.02
            delay += self.dialled.host.slow_s + self.accepted.host.slow_s
        return delay

    def piece(self, size: int) -> int:
        """How many of `size` bytes arrive together: mostly all, at times any part."""
        if size > 1 and self.rng.random() < 0.25:
            size = 1 + int(self.rng.random() * size)
        return min(size, READ_BYTES)

    def reset(self, why: str) -> None:
        """End it for both; what is under way is lost in part, on TCP, or arrives first."""
        self.note(self.dialled, why)
        for end in self.ends:
            if end.protocol is None:
                end.lose(None)
        for end in self.ends:
            if self.tcp:
                end.lose_some(ConnectionResetError("Connection reset by peer"))
            elif not end.lost:
                end.hang_up(None)

    def refuse(self) -> None:
        """No listener accepts it any more: the backlog is dropped with its socket."""
        self.accepted.refuse()

    def note(self, end: End, line: str) -> None:
        """Add to the trace."""
        way = ">" if end is self.dialled else "<"
        self._loop.trace.note(self._loop.time(), f"link {self.number} {way} {line}")

    def left(self, end: End) -> None:
        """This end is gone."""
        if end.peer.lost or end.peer.protocol is None:
            self._forget(self)
