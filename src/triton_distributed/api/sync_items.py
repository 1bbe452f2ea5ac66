"""The items of a synchronous call."""

from __future__ import annotations

from collections import deque
from collections.abc import Coroutine, Iterator
from functools import partial
from typing import Any, Generic, TypeVar

from triton_distributed.api.sync_context import Relay
from triton_distributed.api.sync_loop import SyncLoop
from triton_distributed.calling.call import Call
from triton_distributed.calling.item_stream import ItemStream, Reading, next_message
from triton_distributed.calling.state import ENDED
from triton_distributed.errors import DecodeError
from triton_distributed.observe.timing import Timing

ItemT = TypeVar("ItemT", covariant=True)

MOST_ITEMS = 1024
"""Items that one hand-over to the reading thread takes, unless a single message has more. Decoding them takes about a
millisecond. What is not taken stays in the stream's window, so the handler waits as it does for an async reader."""


class SyncItemStream(Generic[ItemT]):
    """The items of one call. The call has begun when this object exists.

    Iterate over the stream with `for` or `next`, inside `with` or without it. Leaving the loop or the block early, and
    dropping the stream, read or not, cancels the handler. `stream.accepted()` waits until a handler has the request, so
    that a refusal raises before the first item is needed. One thread may read at a time.

    Raises, from iteration and from `accepted`:
        ForkError: the call was made before this process was forked.
        RuntimeError: an event loop runs in this thread.
        Further errors: those of `ItemStream`.
    """

    __slots__ = ("__weakref__", "_error", "_loop", "_ready", "_relay", "_stream")

    def __init__(self, loop: SyncLoop, stream: ItemStream[ItemT], relay: Relay | None) -> None:
        self._loop = loop
        self._stream = stream
        self._relay = relay
        self._error: DecodeError | None = None  # An item after them could not be decoded.
        self._ready: deque[ItemT] = deque()  # Items that the loop has handed over.

    def __iter__(self) -> Iterator[ItemT]:
        self._stream.check_unread()
        return self._read(Reading(self._stream._call, True))

    def _read(self, reading: object) -> Iterator[ItemT]:
        """Yield the items. Dropping this generator drops `reading`, which cancels the handler."""
        loop, ready = self._loop, self._ready
        try:
            while True:
                while ready and not loop.inherited:
                    yield ready.popleft()
                self._fetch()
        except StopAsyncIteration:
            return
        finally:
            self._over()

    def __next__(self) -> ItemT:
        while not self._ready or self._loop.inherited:
            try:
                self._fetch()
            except StopAsyncIteration:
                self._over()
                raise StopIteration from None
            except BaseException:
                self._over()
                raise
        return self._ready.popleft()

    def _fetch(self) -> None:
        """Wait for further items and make them the ready ones.

        They are not the result of the wait: a thread that is interrupted at this moment finds them later.
        """
        self._loop.run("next", partial(self._take, self._stream._call))

    def _take(self, call: Call) -> Coroutine[Any, Any, None] | None:
        """Take what has arrived; if that is nothing, return a coroutine that waits for it. Runs on the loop."""
        return None if self._took(call) else self._wait(call)

    async def _wait(self, call: Call) -> None:
        while not self._took(call):
            await next_message(call)

    def _took(self, call: Call) -> bool:
        """Take the items that can be read without waiting. False if the reader would have to wait.

        Raises:
            StopAsyncIteration: there are no more items.
            Exception: the error that ended the call. It is raised after all items before it were read.
        """
        if (error := self._error) is not None:
            self._error = None
            try:
                raise error
            finally:
                del error  # The error's frames refer to this one.
        items = [*call.items]
        try:
            # An empty inbox is asked only without items, because the end of the call is then taken as read.
            while len(items) < MOST_ITEMS and (not items or (call.stream is not None and call.stream.inbox)):
                taken = call.take()
                if taken == ENDED:
                    raise StopAsyncIteration
                if not taken:
                    break
                items += call.items
        except DecodeError as unreadable:
            if not items:
                raise
            self._error = unreadable
        self._ready += items
        return bool(items)

    def accepted(self) -> None:
        """Wait until a handler has begun with the request, e.g. before an HTTP response gets its status.

        Raises:
            TritonError: as `ItemStream.accepted` raises it.
        """
        self._loop.run("accepted", self._stream.accepted)

    def cancel(self) -> bool:
        """Cancel the handler, in any thread. A thread that reads gets CancelledError. False if the call was over."""
        try:
            return bool(self._loop.run("cancel", self._stream.cancel))
        finally:
            self._over()

    def _over(self) -> None:
        self._ready.clear()
        relay, self._relay = self._relay, None
        if relay is not None:
            relay.detach()

    def __enter__(self) -> SyncItemStream[ItemT]:
        return self

    def __exit__(self, *exception: object) -> None:
        self._leave("its `with` was left, which cancels the handler")

    def close(self) -> None:
        """Cancel the handler, in any thread, as leaving the loop does. WSGI servers call it when the client is gone."""
        self._leave("close() was called")

    def _leave(self, reason: str) -> None:
        self._loop.post(partial(self._stream._call.leave, reason))
        self._over()

    def __del__(self) -> None:
        self._over()  # The call is cancelled because the asynchronous stream is dropped, too.

    def timing(self) -> Timing:
        """Where the time of this call went, so far or in all; see `Timing`."""
        return self._stream.timing()

    @property
    def instance_id(self) -> int | None:
        """The id of the instance that has the request; None before the request was sent."""
        return self._stream.instance_id

    @property
    def request_id(self) -> str:
        """The request's id, as the handler sees it; empty before the request was sent."""
        return self._stream.request_id

    def __repr__(self) -> str:
        return repr(self._stream).replace("<ItemStream", "<SyncItemStream", 1)
