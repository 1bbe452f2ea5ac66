"""A sender: items of one response that threads and callbacks push, instead of a generator that yields them.

The thread that sends an item encodes it. As with plain handlers, up to `AHEAD` items or `AHEAD_BYTES` may wait for the
caller. Beyond that, `send` and `asend` wait, and `try_send` refuses.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, TypeVar, cast

from triton_distributed.annotated import Annotated, parts
from triton_distributed.context import Context, current
from triton_distributed.errors import SenderClosed
from triton_distributed.payload.codec import Message, decode, encode
from triton_distributed.serving.plain import AHEAD, AHEAD_BYTES, Encoded, Ready
from triton_distributed.system import placed
from triton_distributed.wire.frames import ANNOTATED, SMALL

logger = logging.getLogger("triton_distributed.runtime")

T = TypeVar("T")

CLOSED = "close() was called"
OVER = "its request is over: the caller has left, its deadline has passed, or the runtime shuts down"
NOT_RETURNED = "its handler has ended without returning it"

CHECK_S = 1.0
"""Seconds after which a waiting thread checks whether the handler has ended without returning the sender."""


class Pushed:
    """The items of a sender on their way to the caller: the iterator that the request reads.

    The sender refers to it, and not the other way round, so that a sender which the program drops can end the stream.

    Args:
        on_left: see `Sender`.
    """

    def __init__(self, on_left: Callable[[], object] | None) -> None:
        self.loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self.maker = asyncio.current_task()  # The handler's task, until the request reads the first item.
        self._context: Context | None = current.get()
        self._on_left = on_left
        # Guards what follows. It is reentrant, because the collector may run `Sender.__del__` at any point.
        self.lock = threading.RLock()
        self.free = threading.Condition(self.lock)  # Threads wait here for room.
        self.waiting = Ready()  # Items that the request has not taken yet.
        self.size = 0  # Their bytes.
        self.closed = ""  # Why nothing more can be sent; empty while items may be sent.
        self._error: BaseException | None = None  # Raised after the last item.
        self._told = False  # The loop was woken and has not taken the items yet.
        # Only the loop's thread uses what follows.
        self._taken = Ready()  # Items that the request sends now.
        self._reader: asyncio.Future[None] | None = None
        self._writers: deque[asyncio.Future[None]] = deque()  # At most one for each task that sends.

    @property
    def full(self) -> bool:
        """Whether items wait up to the bound."""
        return len(self.waiting) >= AHEAD or self.size >= AHEAD_BYTES

    def on_its_loop(self) -> bool:
        """Whether the caller runs in the thread of the event loop, which must not block."""
        return threading.get_ident() == self._thread

    # Methods for the request, on the loop.

    def __aiter__(self) -> Pushed:
        return self

    async def __anext__(self) -> Ready:
        self.maker = None
        self._taken.clear()
        while True:
            with self.lock:
                self._told = False
                if self.waiting:
                    self._taken, self.waiting, self.size = self.waiting, self._taken, 0
                    self.free.notify_all()
                    break
                if self.closed:
                    error, self._error = self._error, None
                    try:
                        raise StopAsyncIteration if error is None else error
                    finally:
                        del error
            self._reader = self.loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        self._wake_writers()
        return self._taken

    async def aclose(self) -> None:
        """Tell the senders that the request is over."""
        on_left, self._on_left = self._on_left, None
        if not self.close(OVER):
            return
        self._wake_writers()
        if on_left is not None:
            try:
                on_left()
            except Exception:
                logger.exception("on_left= of a Sender raised an error")

    async def room(self) -> None:
        """Wait, on the loop, until an item may be added, or no item can be added any more."""
        while self.full and not self.closed:
            if self.maker is not None and self.maker is asyncio.current_task():
                raise RuntimeError(
                    f"a handler may send {AHEAD} items before it returns its Sender: send more from a task or a thread"
                )
            writer = self.loop.create_future()
            self._writers.append(writer)
            await writer

    def _wake_writers(self) -> None:
        while self._writers:
            if not (writer := self._writers.popleft()).done():
                writer.set_result(None)

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
        if self.closed:
            self._wake_writers()

    # Methods for any thread, with the lock held.

    def wait(self) -> None:
        """Wait in a thread until an item may be added, or no item can be added any more."""
        while self.full and not self.closed:
            if not self.free.wait(CHECK_S) and self._context is not None and self._context.over:
                self.closed = NOT_RETURNED

    def add(self, item: bytes | Encoded, size: int) -> None:
        """Add an item.

        Raises:
            SenderClosed: no more items are taken.
        """
        if self.closed:
            raise SenderClosed(self.closed)
        self.waiting.append(item)
        self.size += size
        if not self._told:
            self._tell()

    def _tell(self) -> None:
        self._told = True
        if self.on_its_loop():
            self._wake()
            return
        try:
            self.loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # The loop is closed, so no caller is left.
            self.closed = self.closed or OVER

    # Methods for any thread, without the lock.

    def close(self, reason: str, error: BaseException | None = None) -> bool:
        """Take no more items. False if that was so before."""
        with self.lock:
            if self.closed:
                return False
            self.closed, self._error = reason, error
            self.free.notify_all()
            self._tell()
            return True


class Sender(Generic[T]):
    """Pushes the items of one response from threads and callbacks. An async handler makes it and returns it.

    ```python
    async def generate(request: GenRequest) -> trd.Sender[Token]:
        sender = trd.Sender[Token](on_left=lambda: engine.abort(request.id))
        engine.submit(request, sender)  # Its thread calls sender.send(token), and at last sender.close().
        return sender
    ```

    The stream stays open until `close()`, and the request keeps its place that long. A sender that the program drops
    without closing it ends the stream with an error. Items are not checked against the handler's annotation, and have
    no resume tokens.

    Args:
        on_left: called once on the event loop if the caller leaves, its deadline passes, or the runtime shuts down,
            before `close()`. An engine can abort its work there.

    Raises:
        RuntimeError: it is not made in an async handler.
    """

    __slots__ = ("__weakref__", "_pushed")

    def __init__(self, *, on_left: Callable[[], object] | None = None) -> None:
        try:
            self._pushed = Pushed(on_left)
        except RuntimeError:
            raise RuntimeError("a Sender is made in an async handler, on the event loop; threads only use it") from None

    def send(self, item: T) -> None:
        """Send an item from a thread. It blocks while the caller does not read.

        Raises:
            SenderClosed: the request is over, or the sender was closed.
            RuntimeError: called in the event loop's thread, which must not block: use `asend` or `try_send`.
            TypeError: the item cannot be encoded.
        """
        pushed = self._pushed
        if pushed.on_its_loop():
            raise RuntimeError("send() would block the event loop: await asend(item), or use try_send(item)")
        data, size = _encoded(item)
        with pushed.lock:
            if pushed.full:
                pushed.wait()
            pushed.add(data, size)

    async def asend(self, item: T) -> None:
        """Send an item on the event loop. It waits while the caller does not read.

        Raises:
            SenderClosed, TypeError: as `send`.
            RuntimeError: called in another thread; or the handler itself calls it before it has returned the sender,
                and the bound of waiting items is reached.
        """
        pushed = self._pushed
        if not pushed.on_its_loop():
            raise RuntimeError("asend() belongs to the event loop of the request: use send(item) in threads")
        data, size = _encoded(item)
        while True:
            await pushed.room()
            with pushed.lock:
                if not pushed.full or pushed.closed:
                    pushed.add(data, size)
                    return

    def try_send(self, item: T) -> bool:
        """Send an item in any thread, without waiting. False: not sent, because the caller does not read.

        Raises:
            SenderClosed, TypeError: as `send`.
        """
        pushed = self._pushed
        if pushed.full and not pushed.closed:
            return False
        data, size = _encoded(item)
        with pushed.lock:
            if pushed.full and not pushed.closed:
                return False
            pushed.add(data, size)
        return True

    def push(self, item: T) -> None:
        """Send an item at once, in any thread, even beyond the bound.

        The code that calls `push` must `await room()` soon.

        Raises:
            SenderClosed, TypeError: as `send`.
        """
        data, size = _encoded(item)
        with self._pushed.lock:
            self._pushed.add(data, size)

    async def room(self) -> None:
        """Wait, on the event loop, until the caller has read enough for another item, or the sender is closed.

        Raises:
            RuntimeError: as `asend`.
        """
        await self._pushed.room()

    def close(self, error: BaseException | None = None) -> None:
        """End the stream after the items sent so far. Works in any thread and never waits. Closing twice is harmless.

        Args:
            error: the caller gets it like an error that the handler raises.
        """
        self._pushed.close(CLOSED, error)

    @property
    def full(self) -> bool:
        """Whether the caller has to read before another item can be sent."""
        return self._pushed.full

    @property
    def closed(self) -> bool:
        """Whether nothing more can be sent: `close()` was called, or the request is over."""
        return bool(self._pushed.closed)

    @property
    def pushed(self) -> Pushed:
        """The items, encoded, for the request that sends them."""
        return self._pushed

    async def __aiter__(self) -> AsyncIterator[T]:
        """The items, for tests that call a handler directly."""
        pushed = self._pushed
        async for ready in pushed:
            while ready:
                item = ready.popleft()
                if isinstance(item, bytes):
                    yield decode(item)
                else:
                    value: Any = decode(item.body, [bytearray(each) for each in item.buffers] or None)
                    yield cast("T", Annotated(*value)) if item.flags & ANNOTATED else value

    def __del__(self) -> None:
        pushed = getattr(self, "_pushed", None)
        if pushed is not None and not pushed.closed:
            pushed.close(CLOSED, RuntimeError("the handler's Sender was dropped without close()"))

    def __repr__(self) -> str:
        pushed = self._pushed
        return f"<Sender {pushed.closed or 'open'}, {len(pushed.waiting)} items waiting>"


def _encoded(item: Any) -> tuple[bytes | Encoded, int]:
    """An item in the form that the request sends, and its size in bytes. Memory of the program is copied."""
    flags = 0
    if item.__class__ is Annotated:
        item, flags = parts(item), ANNOTATED
    data = encode(item, "item")
    if isinstance(data, Message):
        data = data.owned(placed.find)
        return Encoded(data, flags, None), data.nbytes
    size = len(data)
    return (Encoded(data, flags, None) if flags or size > SMALL else data), size
