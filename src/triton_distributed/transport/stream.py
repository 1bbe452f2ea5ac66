"""A stream on an event loop: the waiting that wire.stream leaves to its shell."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from triton_distributed.errors import MessageTooLarge
from triton_distributed.wire import frames as f
from triton_distributed.wire.assembly import Body, fragments, message_bytes
from triton_distributed.wire.hello import Hello
from triton_distributed.wire.states import CLOSED, RECEIVED
from triton_distributed.wire.stream import Link, StreamCore, TokenOutbox


class Owner(Protocol):
    """What a stream belongs to: the served request or the call."""

    def stream_ended(self) -> None:
        """The peer has sent its last; what it sent may still be in the inbox."""

    def stream_closed(self, stream: Stream) -> None:
        """The stream ended early: see its `failure` and `lost`; neither means the peer's CANCEL."""

    def stream_silent(self, stream: Stream, words: str) -> None:
        """The peer has said nothing for long; `stream` stays open unless its owner ends it."""

    def stream_stopped(self) -> None:
        """The peer asks the handler to finish by itself."""


class Shell(Link, Protocol):
    """What a stream, its call and its served request need of their session.

    Attributes:
        loop: the session's.
        address: where the peer is, for error texts.
        peer: the peer's hello, or None before it came.
        streams: the open streams by id.
        send_limit: the largest message that both ends take, bytes.
        unsent: ids of the streams whose request has not left this process, or not all of it.
        paused: the kernel takes no more for now.
        lost: why the session is gone, or None.
        possibly_incomplete: it was lost, and the peer may have said more than has arrived.
    """

    loop: asyncio.AbstractEventLoop
    address: str
    peer: Hello | None
    streams: dict[int, Stream]
    send_limit: int
    unsent: set[int]
    paused: bool
    lost: str | None
    possibly_incomplete: bool

    def accept(self, stream: Stream, begin: Callable[[], None]) -> None:
        """Tell the peer that the handler of `stream` begins, then call `begin`."""

    def withdraw(self, stream: Stream) -> None:
        """`stream` was closed early: its handler does not begin any more."""

    def write_after(self, start: bytes, piece: memoryview) -> None:
        """Write a fragment after the session's own frames that wait, without copying it."""

    async def resumed(self) -> None:
        """Wait until the kernel takes output again, or the session is gone or silent."""


class Stream(StreamCore):
    """One end of a stream, with what waits for it.

    Attributes:
        owner: hears of it when the stream ends early; set when the stream is opened or accepted.
        lost: why the session is gone, where that ended the stream.
    """

    __slots__ = ("_reader", "_writer", "lost", "owner")
    connection: Shell

    def __init__(self, connection: Shell, stream_id: int, credit: int, window: int) -> None:
        StreamCore.__init__(self, connection, stream_id, credit, window)
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self.owner: Owner | None = None
        self.lost: str | None = None

    async def readable(self) -> None:
        """Wait until there is something in `inbox` or the peer sends nothing more.

        Raises:
            RuntimeError: another reader waits.
        """
        while not self.inbox and not self.finished:
            await self.next_readable()

    def next_readable(self) -> asyncio.Future[None]:
        """A future that is done when something has come or ended.

        Raises:
            RuntimeError: another reader waits for one.
        """
        waiter = self._reader
        if waiter is not None and not waiter.done():
            raise RuntimeError("another task is reading this stream: one reads at a time, as of an async generator")
        waiter = self._reader = self.connection.loop.create_future()
        return waiter

    @property
    def awaited(self) -> bool:
        """Whether a reader waits."""
        return self._reader is not None and not self._reader.done()

    async def writable(self) -> None:
        """Wait until the stream may send again, or is closed. One writer at a time."""
        while not self.may_push:
            waiter = self._writer = self.connection.loop.create_future()
            try:
                await waiter
            finally:
                self._writer = None

    async def send(self, body: Body, buffers: Sequence[memoryview], flags: int = 0, kind: int = f.DATA) -> None:
        """Send one message of any size after what was pushed, in fragments, each as credit allows.

        The buffers are written from where they are and are not referenced any more when this returns.

        Args:
            flags: `END` where it is this end's last; `ANNOTATED`.
            kind: REQUEST to open the stream with it.

        Raises:
            MessageTooLarge: it is above the limit of this end or of the peer; nothing was sent.
            ValueError: it has more buffers than a message can hold; nothing was sent.
        """
        session = self.connection
        if self.item_flags and isinstance(self.outbox, TokenOutbox):
            body = b"".join((self.outbox.pair(), body))
            flags |= self.item_flags
        size = message_bytes(len(body), buffers)
        if size > session.send_limit:
            raise MessageTooLarge("the request" if kind == f.REQUEST else "the item", size, session.send_limit)
        if kind == f.REQUEST:
            session.unsent.add(self.id)
        try:
            for fragment_flags, start, piece in fragments(body, buffers, flags):
                while self.state != CLOSED and (self.credit <= 0 or session.paused):
                    await (self.writable() if self.credit <= 0 else session.resumed())
                if self.state == CLOSED:
                    return
                self.settle()
                length = len(start) + piece.nbytes
                session.write_after(f.HEADER.pack(length, kind, fragment_flags, self.id) + start, piece)
                self.charge(length, fragment_flags)
                kind = f.DATA
                if fragment_flags & f.MORE and not session.paused:
                    await asyncio.sleep(0)  # let other streams write, even where the kernel takes everything at once
        finally:
            session.unsent.discard(self.id)
        if buffers:
            while session.paused and session.lost is None:  # the transport still refers to the last of them
                await session.resumed()

    async def send_request(
        self,
        instance_id: int,
        endpoint_key: int,
        timeout_s: float,
        metadata: bytes,
        body: Body,
        buffers: Sequence[memoryview],
        end: bool,
    ) -> None:
        """Open the stream at the peer with a request of any size.

        Args:
            timeout_s: seconds that the call has left; infinite where it has no deadline.
            end: the request is all that this end will send.

        Raises:
            as `send`.
        """
        prefix = f.request_prefix(instance_id, endpoint_key, timeout_s, self.window, metadata)
        await self.send(prefix + body, buffers, f.END if end else 0, f.REQUEST)

    def on_readable(self) -> None:
        waiter = self._reader
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        if self.state >= RECEIVED and self.owner is not None:
            self.owner.stream_ended()

    def on_writable(self) -> None:
        waiter = self._writer
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def abort(self, kind: int, code: int = 0, detail: bytes = b"") -> None:
        super().abort(kind, code, detail)
        self.quota = 0  # a writer that pushes all the same has to look at once
        self.connection.withdraw(self)
        self.wake()  # a reader or writer at this end finds it closed

    def wake(self) -> None:
        """Let a waiting reader and writer look again."""
        for waiter in (self._reader, self._writer):
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    def on_stop(self) -> None:
        if self.owner is not None:
            self.owner.stream_stopped()

    def on_closed(self) -> None:
        self.quota = 0
        self.connection.withdraw(self)
        self.wake()
        if self.owner is not None:
            self.owner.stream_closed(self)
