"""What a call has received, as its reader takes it: message by message, then its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from threading import get_ident
from typing import TYPE_CHECKING, Any

from triton_distributed.errors import DecodeError, StreamIncomplete, TritonError
from triton_distributed.names import Instance
from triton_distributed.runtime.annotated import Annotated
from triton_distributed.runtime.resuming import Resumption, unpaired
from triton_distributed.wire import frames as f
from triton_distributed.wire.codec import decode

if TYPE_CHECKING:
    from triton_distributed.runtime.client import Client
    from triton_distributed.runtime.dispatch import Dispatch
    from triton_distributed.transport.stream import Stream

logger = logging.getLogger("triton_distributed.runtime")


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
    """

    __slots__ = (
        "_annotated",
        "_error",
        "_outcome",
        "_request_id",
        "client",
        "dispatch",
        "done",
        "instance",
        "items",
        "reading",
        "received",
        "resumption",
        "stream",
        "unary",
    )

    _annotated: bool
    _error: BaseException | None  # what ended the call
    _outcome: int | None
    _request_id: str | None
    client: Client
    dispatch: Dispatch | None
    done: bool
    instance: Instance | None
    items: Iterator[Any]
    reading: bool
    received: int
    resumption: Resumption | None
    stream: Stream | None
    unary: bool

    def take(self) -> bool:
        """Make the next message's items the current ones. False: wait first.

        Raises:
            StopAsyncIteration: there are no more.
            Exception: what ended the call.
        """
        stream = self.stream
        if stream is not None and stream.inbox:
            cost, kind, flags, payload, buffers = stream.inbox.popleft()
            stream.read(cost)
            try:
                items = decode(payload, buffers)
                if kind == f.BATCH and type(items) is not list:
                    raise DecodeError("the worker sent a batch that is none")
            except DecodeError:
                self.leave()
                raise
            if flags & f.CHECKPOINT or self.resumption is not None:
                items = self._resumable(items, kind == f.BATCH, flags)
            elif kind != f.BATCH:
                items = (items,)
            if flags & f.ANNOTATED:
                try:
                    items = [Annotated(*each) if self._annotated else each[0] for each in items]
                except (TypeError, LookupError) as fault:
                    self.leave()
                    raise DecodeError(f"the worker sent an annotated item that is none: {fault}") from fault
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
        self.done = True
        if self._error is None:
            raise StopAsyncIteration
        # Told once, as a generator does, and not kept: an error knows the frames that know this call.
        error, self._error = self._error, None
        if isinstance(error, StreamIncomplete):
            error.items = 0 if self.unary else self.received
        try:
            raise error
        finally:
            del error

    def _resumable(self, items: Any, batch: bool, flags: int) -> Any:
        """The items of a message that are new to the caller, where they may have tokens or some may be here already."""
        tokens = None
        try:
            if flags & f.CHECKPOINT:
                items, tokens = unpaired(items, batch)
            elif not batch:
                items = (items,)
        except DecodeError:
            self.leave()
            raise
        return items if self.resumption is None else self.resumption.received(items, tokens)

    def pending(self) -> asyncio.Future[None]:
        """What to await when `take` had nothing to say. Cancelled there, the reader calls `leave`."""
        if self.stream is not None:
            return self.stream.next_readable()
        assert self.dispatch is not None
        return asyncio.shield(self.dispatch.sent)

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
        """Whoever read was cancelled: that cancels the handler, and who reads on must not take it for a clean end."""
        if self._outcome is None and self.instance is not None and self.stream is not None:
            self._error = StreamIncomplete(
                self.target,
                self.instance.id,
                self.stream.connection.address,
                "its reader was cancelled, e.g. by a timeout around a single item, which cancels the handler",
                self.received,
            )
        self.leave()

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

    def leave(self) -> None:
        """Cancel the handler and drop what was received: its reader is gone."""
        raise NotImplementedError
