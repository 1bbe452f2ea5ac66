"""What a call has received, as its reader takes it: message by message, then its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from asyncio import _get_running_loop as _running_loop
from collections.abc import Callable, Iterator
from threading import get_ident
from typing import TYPE_CHECKING, Any

from triton_distributed.annotated import Annotated
from triton_distributed.calling.resume import Resumption, unpaired
from triton_distributed.errors import DecodeError, RemoteError, StreamClosed, StreamIncomplete, TritonError
from triton_distributed.names import Instance
from triton_distributed.payload.codec import decode
from triton_distributed.wire import frames as f

if TYPE_CHECKING:
    from triton_distributed.calling.dispatch import Dispatch
    from triton_distributed.runtime.client import Client
    from triton_distributed.transport.stream import Stream

logger = logging.getLogger("triton_distributed.runtime")

UNREADABLE = "a message of the worker could not be read, which ended the call"
LEFT = "its `async for` was left, or what read it was dropped, which cancels the handler"


class Receiving:
    """The half of a call that its reader sees. `Call`, its other half, makes it, and sets all of it.

    Attributes:
        client: who calls.
        dispatch: what looks for an instance, where the request could not be sent at once.
        instance: who was asked, the last where there were several.
        stream: the stream to it; None while none is open.
        items: decoded items of the message that is being read.
        reading: an `async for` goes over it.
        received: items handed to the caller, of the present instance where only the whole answer counts.
        done: the caller gets nothing more: it has ended, failed or was cancelled.
        resumption: where it goes on when its instance is lost; None where it does not.
        unary: the caller sees an answer only when it is whole.
        read_whole: an `async for` has come to the end of it.
    """

    __slots__ = (
        "_annotated",
        "_closed",
        "_error",
        "_outcome",
        "_request_id",
        "_told",
        "_unsent_reader",
        "client",
        "dispatch",
        "done",
        "instance",
        "items",
        "read_whole",
        "reading",
        "received",
        "resumption",
        "stream",
        "unary",
    )

    _annotated: bool
    _closed: str | None  # what has closed the stream here, for readers that come later
    _error: BaseException | None  # what ended the call, until it is raised
    _outcome: int | None
    _request_id: str | None
    _told: str | None  # the error, in words, when it was raised
    _unsent_reader: asyncio.Future[None] | None  # of who reads before the request was sent
    client: Client
    dispatch: Dispatch | None
    done: bool
    instance: Instance | None
    items: Iterator[Any]
    read_whole: bool
    reading: bool
    received: int
    resumption: Resumption | None
    stream: Stream | None
    unary: bool

    def take(self) -> bool:
        """Make the next message's items the current ones. False: wait first.

        Raises:
            StopAsyncIteration: there are no more.
            WrongLoop: another thread or event loop than the call's own reads.
            Exception: what ended the call.
        """
        if _running_loop() is not self.client.loop:
            self.client.check_loop("reading a stream")
        stream = self.stream
        if stream is not None and stream.inbox:
            cost, kind, flags, payload, buffers = stream.inbox.popleft()
            stream.read(cost)
            try:
                items = decode(payload, buffers)
                if kind == f.BATCH and type(items) is not list:
                    raise DecodeError("the worker sent an invalid batch")
            except DecodeError:
                self.leave(UNREADABLE)
                raise
            if flags & f.CHECKPOINT or self.resumption is not None:
                items = self._resumable(items, kind == f.BATCH, flags)
            elif kind != f.BATCH:
                items = (items,)
            if flags & f.ANNOTATED:
                try:
                    items = [Annotated(*each) if self._annotated else each[0] for each in items]
                except (TypeError, LookupError) as fault:
                    self.leave(UNREADABLE)
                    raise DecodeError(f"the worker sent an invalid annotated item: {fault}") from fault
                self.received += len(items)
                self.items = iter(items)
                return True
            self.received += len(items)
            self.items = map(Annotated, items) if self._annotated else iter(items)
            return True
        if self._outcome is None and self.resumption is not None and self.resumption.lost is not None:
            self.go_on(self.resumption)
        if self._outcome is None:
            return False
        raise self._end()

    def _end(self) -> BaseException:
        """The exception that tells a reader that nothing more comes."""
        self.done = True
        error, self._error = self._error, None
        if error is not None:
            # The error is raised once, and not kept: it refers to frames that refer to this call.
            if isinstance(error, StreamIncomplete) and not isinstance(error, RemoteError):  # not one of the handler's
                error.items = 0 if self.unary else self.received
            self._told = _words(error)
            return error
        if self._closed is not None:
            return self._stream_closed(self._closed)
        self.read_whole = self.reading and self._told is None
        return StopAsyncIteration()

    def _stream_closed(self, reason: str) -> StreamClosed:
        instance_id = 0 if self.instance is None else self.instance.id
        address = "" if self.stream is None else self.stream.connection.address
        return StreamClosed(self.target, instance_id, address, reason, self.received)

    def check_readable(self) -> None:
        """Raise where an `async for` begins on a stream whose end is known: it would look like an empty answer.

        Raises:
            StreamClosed: the stream has raised its error before.
            RuntimeError: another `async for` has read it to its end.
        """
        if self._told is not None:
            raise self._stream_closed(f"it has failed before, with {self._told}")
        if self.read_whole:
            raise RuntimeError(
                f"the stream from {self.target} was read to its end already ({self.received} items), and a stream can "
                "be read once: keep the items, or call again"
            )

    def _resumable(self, items: Any, batch: bool, flags: int) -> Any:
        """The items of a message that are new to the caller, where they may have tokens or some may be here already."""
        tokens = None
        try:
            if flags & f.CHECKPOINT:
                items, tokens = unpaired(items, batch)
            elif not batch:
                items = (items,)
        except DecodeError:
            self.leave(UNREADABLE)
            raise
        return items if self.resumption is None else self.resumption.received(items, tokens)

    def pending(self) -> asyncio.Future[None]:
        """What to await when `take` had nothing to say. Cancelled there, the reader calls `leave`.

        Raises:
            RuntimeError: another task waits already.
        """
        if self.stream is not None:
            return self.stream.next_readable()
        assert self.dispatch is not None
        self._unsent_reader = asyncio.shield(self.dispatch.sent)
        return self._unsent_reader

    @property
    def awaited(self) -> bool:
        """Whether a task waits for the next item now."""
        waiter = self._unsent_reader
        return (waiter is not None and not waiter.done()) or (self.stream is not None and self.stream.awaited)

    async def next_message(self) -> None:
        """Wait for the next message and make its items the current ones.

        Raises:
            As `take` does.
        """
        while not self.take():
            try:
                await self.pending()
            except asyncio.CancelledError:
                self.abandon()
                raise

    def abandon(self) -> None:
        """The reader was cancelled, and so is the handler."""
        self.leave("its reader was cancelled, e.g. by a timeout around a single item, which cancels the handler")

    def discard(self) -> None:
        """Nobody will read: let the request run, and drop what it answers."""
        self.client.spawn(self._discard())

    def from_finalizer(self, what: Callable[[], None]) -> None:
        """Do `what` on the loop's thread: the collector runs finalizers in whichever thread it happens to run."""
        client = self.client
        if client.loop.is_closed():
            return
        if get_ident() == client.thread:
            what()
        else:
            with contextlib.suppress(RuntimeError):  # it was closed this very moment
                client.loop.call_soon_threadsafe(what)

    async def _discard(self) -> None:
        try:
            while True:
                await self.next_message()
        except (StopAsyncIteration, asyncio.CancelledError):
            pass
        except Exception as error:
            logger.info('a call to "%s" that nobody read failed: %s', self.client.view.name.path, error)

    # what there is to know of it

    @property
    def dispatching(self) -> asyncio.Future[None] | None:
        """Done when the request was sent or cannot be; None where it was sent at once."""
        return self.dispatch.sent if self.dispatch is not None else None

    @property
    def refusal(self) -> BaseException | None:
        """Why the request could not be sent anywhere."""
        return self._error if self._outcome is not None and self.stream is None else None

    def take_refusal(self) -> BaseException | None:
        """`refusal` to be raised by whoever awaits; reading afterwards raises another of the same."""
        error = self.refusal
        if isinstance(error, TritonError):
            self._error = type(error)(*error.args)
        return error

    @property
    def over(self) -> bool:
        """Nothing more comes from the worker."""
        return self._outcome is not None

    @property
    def request_id(self) -> str:
        """The request's id, as the handler sees it; empty before it was sent."""
        if self._request_id is not None:
            return self._request_id
        if self.stream is None:
            return ""
        return f"{self.stream.connection.hello.nonce:x}-{self.stream.id:x}"

    @property
    def target(self) -> str:
        """What was called, for error texts."""
        return f'endpoint "{self.client.view.name.path}"'

    # what the other half does

    def go_on(self, resumption: Resumption) -> None:
        """The instance was lost, and what had come from it is read: ask another for the rest."""
        raise NotImplementedError

    def leave(self, words: str = LEFT) -> None:
        """Cancel the handler and drop what was received: its reader is gone.

        Args:
            words: what closed the stream, for those who read it all the same.
        """
        raise NotImplementedError


def _words(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # the text of a user's exception is the user's code
        return type(error).__name__
