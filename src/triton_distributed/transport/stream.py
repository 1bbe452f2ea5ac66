"""A stream on an event loop: adds waiting to `wire.stream`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from triton_distributed.compiled import mypyc_attr
from triton_distributed.errors import MessageTooLarge
from triton_distributed.transport.shared_memory import Loan, SessionMemory
from triton_distributed.wire import frames as f
from triton_distributed.wire.assembly import Body, fragments, message_bytes
from triton_distributed.wire.connection import Connection, Shell
from triton_distributed.wire.states import CLOSED, RECEIVED
from triton_distributed.wire.stream import StreamCore, paired


@mypyc_attr(allow_interpreted_subclasses=True)
class Owner:
    """The owner of a stream: a served request or a call. By default nothing happens."""

    __slots__ = ()

    def stream_ended(self) -> None:
        """Called when the peer sends nothing more; the inbox may still hold messages."""

    def stream_closed(self, stream: Stream) -> None:
        """Called when the stream ended early: see `failure` and `lost`; if both are None, the peer sent CANCEL."""

    def stream_silent(self, stream: Stream, words: str) -> None:
        """Called when the peer is silent; `stream` stays open unless its owner ends it."""

    def stream_stopped(self) -> None:
        """Called when the peer asks the handler to finish on its own."""


@mypyc_attr(allow_interpreted_subclasses=True)
class StreamSession(Shell):
    """What a stream, its call and its served request need from their session.

    Attributes:
        loop: the session's event loop.
        connection: the session's protocol, without I/O.
        address: the peer's address, for error texts.
        send_limit: the largest message that both ends accept, bytes.
        unsent: ids of the streams whose request has not left this process completely.
        memory: the session's part in shared memory, or None.
        paused: the kernel accepts no output for now.
        lost: why the session was lost, or None.
        possibly_incomplete: the session was lost, and the peer may have sent more than has arrived.
        waiters: the futures of those that wait until the kernel accepts output.
    """

    loop: asyncio.AbstractEventLoop
    connection: Connection[Stream]
    address: str
    send_limit: int
    unsent: set[int]
    memory: SessionMemory | None
    paused: bool
    lost: str | None
    possibly_incomplete: bool
    waiters: dict[asyncio.Future[None], None]

    def accept(self, stream: Stream, begin: Callable[[], None]) -> None:
        """Tell the peer that the handler of `stream` begins, then call `begin`."""
        raise NotImplementedError

    def withdraw(self, stream: Stream) -> None:
        """Drop a handler that has not begun: `stream` was closed early."""
        raise NotImplementedError

    def write_after(self, start: bytes, piece: memoryview) -> None:
        """Write a fragment after the session's waiting frames, without copying it."""
        raise NotImplementedError

    async def resumed(self) -> None:
        """Wait until the kernel accepts output again, or the session is lost or silent."""
        raise NotImplementedError


@mypyc_attr(allow_interpreted_subclasses=True)
class Stream(StreamCore):
    """One end of a stream, with its waiting reader and writer.

    Attributes:
        owner: receives the stream's events; set when the stream is opened or accepted.
        lost: why the session was lost, if that ended the stream; else None.
        session: the session that carries the stream.
        blocked_s: seconds for which this end waited for credit, because the peer did not read.
    """

    __slots__ = ("_reader", "_writer", "blocked_s", "lost", "owner", "session")

    def __init__(self, connection: Connection[Stream], stream_id: int, credit: int, window: int) -> None:
        StreamCore.__init__(self, connection, stream_id, credit, window)
        shell: Any = connection.shell
        self.session: StreamSession = shell
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self.owner: Owner | None = None
        self.lost: str | None = None
        self.blocked_s = 0.0

    async def readable(self) -> None:
        """Wait until `inbox` holds a message or the peer sends nothing more.

        Raises:
            RuntimeError: another task is reading.
        """
        while not self.inbox and not self.finished:
            await self.next_readable()

    def next_readable(self) -> asyncio.Future[None]:
        """Return a future that is done when a message has arrived or the stream has ended.

        Raises:
            RuntimeError: another task is reading.
        """
        waiter = self._reader
        if waiter is not None and not waiter.done():
            raise RuntimeError("another task is reading this stream: only one may, as with an async generator")
        waiter = self._reader = self.session.loop.create_future()
        return waiter

    @property
    def awaited(self) -> bool:
        """Whether a reader waits."""
        return self._reader is not None and not self._reader.done()

    async def writable(self) -> None:
        """Wait until the stream may send again, or is closed. Only one writer may wait at a time."""
        while not self.may_push:
            waiter = self._writer = self.session.loop.create_future()
            blocked, since = self.credit <= 0, monotonic()
            try:
                await waiter
            finally:
                self._writer = None
                if blocked:
                    self.blocked_s += monotonic() - since

    async def send(
        self,
        body: Body,
        buffers: Sequence[memoryview],
        flags: int = 0,
        kind: int = f.DATA,
        loan: Loan | None = None,
    ) -> None:
        """Send one message of any size after the pushed items, in fragments, as credit allows.

        The buffers are not copied, and are no longer referenced when this returns.

        Args:
            flags: `END` if it is this end's last message; `ANNOTATED`.
            kind: REQUEST if it opens the stream.
            loan: the buffers that lie in shared memory already, see `SessionMemory.lend`; this function ends it. A
                REQUEST cannot wait for shared memory, because its stream has an id.

        Raises:
            MessageTooLarge: the message exceeds the limit of this end or of the peer; nothing was sent.
            ValueError: there are more buffers than a message can hold; nothing was sent.
        """
        session = self.session
        if self.item_flags:
            body = paired(self, body)
            flags |= self.item_flags
        size = message_bytes(len(body), buffers)
        try:
            if size > session.send_limit:
                raise MessageTooLarge("the request" if kind == f.REQUEST else "the item", size, session.send_limit)
            if kind == f.REQUEST:
                session.unsent.add(self.id)
                if size > f.MAX_FRAME:
                    session.connection.pace.large_opened += 1
            await self._sendable(first=True)
            memory = session.memory
            if buffers and kind != f.REQUEST and memory is not None and memory.wants(buffers):
                loan = await memory.lend(buffers)
                await self._sendable(first=True)
            places = () if loan is None else loan.places
            for fragment_flags, start, piece in fragments(body, buffers, flags, self._fragment_bytes, places):
                if self.state == CLOSED:
                    return
                self.settle()
                length = len(start) + piece.nbytes
                session.write_after(f.HEADER.pack(length, kind, fragment_flags, self.id) + start, piece)
                self.charge(length, fragment_flags, loan is not None and loan.sent())
                kind = f.DATA
                if fragment_flags & f.MORE:
                    if not session.paused:
                        await asyncio.sleep(0)  # let other streams write, even if the kernel accepts all at once
                    await self._sendable(first=False)
        finally:
            session.unsent.discard(self.id)
            if loan is not None:
                loan.drop()
        if buffers:
            while session.paused and session.lost is None:  # the transport still refers to the last buffers
                await session.resumed()

    async def _sendable(self, first: bool) -> None:
        """Wait until a fragment may be written, or the stream is closed.

        Args:
            first: True for the first fragment, which must leave in the turn in which a request has got its id. Before
                another one, those write that also wait for the kernel; but only once, or they could keep it away.
        """
        session = self.session
        polite = not first
        while self.state != CLOSED:
            if self.credit <= 0:
                await self.writable()
            elif session.paused:
                await session.resumed()
            elif polite and session.waiters:
                polite = False
                await asyncio.sleep(0)
            else:
                return

    def _fragment_bytes(self) -> int:
        return self.session.connection.fragment_bytes(self.credit)

    async def send_request(
        self,
        instance_id: int,
        endpoint_key: int,
        timeout_s: float,
        metadata: bytes,
        body: Body,
        buffers: Sequence[memoryview],
        end: bool,
        loan: Loan | None = None,
    ) -> None:
        """Open the stream at the peer with a request of any size.

        Args:
            timeout_s: seconds until the call's deadline; infinite if it has none.
            end: True if the request is all that this end sends.
            loan: as in `send`.

        Raises:
            Exception: as `send` raises it.
        """
        prefix = f.request_prefix(instance_id, endpoint_key, timeout_s, self.window, metadata)
        await self.send(prefix + body, buffers, f.END if end else 0, f.REQUEST, loan)

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
        self.quota = 0  # a writer that pushes anyway must check at once
        self.session.withdraw(self)
        self.wake()  # a reader or writer at this end finds it closed

    def wake(self) -> None:
        """Wake a waiting reader and writer, so that they check the stream again."""
        for waiter in (self._reader, self._writer):
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    def on_stop(self) -> None:
        if self.owner is not None:
            self.owner.stream_stopped()

    def on_closed(self) -> None:
        self.quota = 0
        self.session.withdraw(self)
        self.wake()
        if self.owner is not None:
            self.owner.stream_closed(self)
