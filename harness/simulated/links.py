"""Connections of the simulated network: delayed, cut into any pieces, reset, truncated, garbled.

One direction of a connection consists of the data that the sender's transport holds, a kernel buffer of limited size,
and arrivals. Each arrival brings a part of the buffer to the receiver, after its own delay.

There are two kinds of connection, as in real systems. Data that a Unix socket has taken reaches the peer, whatever
happens to the sender. On TCP a reset loses data under way. Then `complete` is False at the end that may have missed
data.

In a real network, checksums detect garbled bytes, and the wire has no checksum of its own. So garbled data begins with
the header of a frame here, as after a defect in a program, and it can always be distinguished from a frame.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from harness.simulated.hosts import Host, HostsLoop
from triton_distributed.system.protocol import StreamProtocol
from triton_distributed.wire.frames import HEADER, HEADER_BYTES

READ_BYTES = 256 * 1024  # Bytes that are delivered at once, as by a socket.


class End(asyncio.Transport):
    """One end of a link, and the direction in which it sends.

    Attributes:
        complete: all data of the other end had arrived before this end learned of the loss of the connection.
        reads_in_place: see `transport.bulk_reader`.
    """

    reads_in_place = False

    def __init__(self, link: Link, host: Host, protocol: StreamProtocol | None, room: int) -> None:
        super().__init__()
        self.link = link
        self.host = host
        self.protocol = protocol
        self.peer: End
        self.complete = True
        self._held: deque[bytes] = deque()  # Data that the kernel has not taken. The writer is paused meanwhile.
        self._held_bytes = 0
        self._kernel = bytearray()
        self._room = room
        self._paused = self._closing = self._lost = False
        self._arriving = False  # An arrival is under way.
        self._fin = False  # Nothing more is sent.
        self._fin_error: Exception | None = None
        self._fin_told = False
        self._left: int | None = None  # Bytes until the direction is truncated.
        self._garble_in: int | None = None  # Bytes after which the next frame is garbled.
        self._frame_left = 0  # Bytes until the next header.

    def __repr__(self) -> str:
        return f"<End {self.link.number} of {self.host.name}>"

    # The interface of asyncio.Transport.

    def write(self, data: Any) -> None:
        if self._closing or self._lost or not data:
            return
        if self._fin:
            if not self.link.tcp and self is self.link.accepted:
                self.lose(BrokenPipeError("Broken pipe"))  # Before a handler begins whose ACCEPT is lost.
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
        """Do nothing: the session asks for 0, which is what this transport does."""

    def get_write_buffer_size(self) -> int:
        return self._held_bytes

    def get_protocol(self) -> asyncio.BaseProtocol:
        assert self.protocol is not None
        return cast(asyncio.BaseProtocol, self.protocol)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    # The way of the data.

    def start(self, protocol: StreamProtocol) -> None:
        """Connect this end."""
        self.protocol = protocol
        self._soon(self._made)

    def _made(self) -> None:
        assert self.protocol is not None
        self.protocol.connection_made(self)
        self.peer.move()

    def _soon(self, what: Callable[..., object], *arguments: Any) -> None:
        self.host.loop.call_soon(what, *arguments, context=self.host.context)

    def _fill(self) -> None:
        """Give the kernel as much data as it has room for."""
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
        """Schedule the arrival of the kernel's data, or of its end."""
        waiting = self._kernel or (self._fin and not self._fin_told)
        if self._arriving or not waiting or self.peer.protocol is None:
            return
        self._arriving = True
        loop, delay = self.host.loop, self.link.delay_s(soon)
        loop.call_at(loop.time() + delay, self._arrive, context=self.peer.host.context)

    def _arrive(self) -> None:
        """Deliver a part of the data. Runs in the peer's context."""
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
        """Reset the connection: the peer closed before it read the data. Data that it had sent may be lost."""
        self._kernel.clear()
        self._drop_held()
        self.peer.lose_some(ConnectionResetError("the peer reset the connection"))

    def lose_some(self, error: Exception) -> None:
        """Let a part of the data under way arrive, and then lose the connection with `error`."""
        if self._fin_told:
            return
        if self._kernel:
            del self._kernel[self.link.rng.randrange(len(self._kernel) + 1) :]
        self._drop_held()
        self.peer.complete = False
        self._fin, self._fin_error = True, error
        self.move()

    def lose(self, error: Exception | None) -> None:
        """Lose the connection at this end."""
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
        """Finish the close: all data that can be sent is written."""
        if not self._lost:
            self.lose(None)

    def _drop_held(self) -> None:
        self._held.clear()
        self._held_bytes = 0

    @property
    def lost(self) -> bool:
        """Whether the protocol has learned, or will learn, of the loss of the connection."""
        return self._lost

    # Faults.

    def kill(self) -> None:
        """End this end's process. Its kernel sends what it has."""
        if self._lost:
            return
        self._drop_held()
        if self.peer._kernel and not self._fin:  # unread here
            self._fin_error = ConnectionResetError("Connection reset by peer")
            self.peer.complete = not self.link.tcp
        self.lose(None)

    def refuse(self) -> None:
        """Refuse the connection: this end has no process."""
        self.lose(None)
        self.peer.lose(ConnectionResetError("Connection reset by peer"))

    def hang_up(self, error: Exception | None) -> None:
        """Send nothing more. The kernel's data arrives, and then the end."""
        self._drop_held()
        self._fin, self._fin_error = True, error
        self.move()

    def truncate(self, amount: int) -> None:
        """End the connection after another `amount` bytes in this direction. A part of the sent data is lost then."""
        self.link.tcp = True
        self._left = amount

    def garble(self, amount: int) -> None:
        """Let the first frame after another `amount` bytes, and all data after it, arrive as noise."""
        self._garble_in = amount

    def mend(self) -> None:
        """Carry all data again, unless the direction is garbled already."""
        self._left = None
        if self._garble_in:
            self._garble_in = None

    def _garbled(self, data: bytes) -> bytes:
        """Follow the frames; when garbling is due, overwrite all data from the next header on."""
        if self._garble_in == 0:
            return b"\xff" * len(data)
        at = self._frame_left
        while at < len(data):
            if self._garble_in is not None and at >= self._garble_in:
                self._garble_in = 0
                self.link.note(self, "garbled")
                return data[:at] + b"\xff" * (len(data) - at)
            if len(data) - at < HEADER_BYTES:  # Not our protocol.
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
        number: the link's number in the trace.
        loop: the loop.
        rng: the source of all randomness.
        dialler: the host that dials.
        protocol: the protocol of the end that dials.
        acceptor: the host that listens.
        tcp: whether a reset loses data under way.
        forget: called when both ends are gone.
    """

    def __init__(
        self,
        number: int,
        loop: HostsLoop,
        rng: random.Random,
        dialler: Host,
        protocol: StreamProtocol,
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
        """The end that dialled, and the other end."""
        return self.dialled, self.accepted

    def delay_s(self, soon: bool) -> float:
        """Draw the delay of the next piece, seconds: mostly short, sometimes much longer."""
        rng = self.rng
        delay = rng.random() * 0.0005
        if not soon:
            chance = rng.random()
            if chance < 0.05:
                delay += rng.random() * 0.02
            delay += self.dialled.host.slow_s + self.accepted.host.slow_s
        return delay

    def piece(self, size: int) -> int:
        """Draw how many of `size` bytes arrive together: mostly all, sometimes any part."""
        if size > 1 and self.rng.random() < 0.25:
            size = 1 + int(self.rng.random() * size)
        return min(size, READ_BYTES)

    def reset(self, why: str) -> None:
        """End the connection for both ends. On TCP a part of the data under way is lost; otherwise it arrives first."""
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
        """Refuse the connection: the listener's backlog was dropped with its socket."""
        self.accepted.refuse()

    def note(self, end: End, line: str) -> None:
        """Add a line to the trace."""
        way = ">" if end is self.dialled else "<"
        self._loop.trace.note(self._loop.time(), f"link {self.number} {way} {line}")

    def left(self, end: End) -> None:
        """Note that an end is gone."""
        if end.peer.lost or end.peer.protocol is None:
            self._forget(self)
