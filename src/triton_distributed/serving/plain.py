"""A handler written with plain `def`: one computation in one thread and one context.

The thread encodes each item before the handler continues. So the caller gets each item as it was yielded, even if the
handler changes it afterwards. Up to `AHEAD` small items may wait here. An item with large memory is not copied: the
handler waits at its `yield` until that memory was written, as an async generator does.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Generator, Iterator
from functools import partial
from typing import Any

from triton_distributed.annotated import Annotated, parts
from triton_distributed.context import Context
from triton_distributed.payload.codec import Message, encode
from triton_distributed.serving.threads import Computation, HandlerThreads
from triton_distributed.wire.assembly import message_bytes, one_frame
from triton_distributed.wire.frames import ANNOTATED, BUFFERS, MAX_FRAME, SMALL

logger = logging.getLogger("triton_distributed.runtime")

AHEAD = 64
"""The number of items that a generator may be ahead of its reader."""

AHEAD_BYTES = 4 * MAX_FRAME
"""The bytes of items that a generator may be ahead. Items of 64 KiB are as fast with this limit as with no limit."""

# The types that handlers return most often. They are neither awaitable nor iterators, so no check is needed.
VALUES = frozenset({type(None), bool, int, float, str, bytes, dict, list, tuple})
_MISSING = object()


class Encoded:
    """An encoded item that is large, or has flags or a resume token.

    Attributes:
        body, buffers, flags: arguments of `Stream.send`.
        token: the item's resume token, encoded, or None.
        written: set by the sender when the buffers may change again.
    """

    __slots__ = ("body", "buffers", "flags", "token", "written")

    def __init__(self, data: bytes | Message, flags: int, token: bytes | None) -> None:
        self.body, self.buffers = (data, []) if isinstance(data, bytes) else (data.body, data.buffers)
        self.flags = flags
        self.token = token
        self.written = False


class Ready(deque[bytes | Encoded]):
    """Items that can be sent, in order: `bytes` of at most `SMALL`, or `Encoded`. The reader takes all of them."""


class PlainHandler(Computation):
    """One request at a plain handler: an async iterator.

    Each step waits until there are items, and returns the same `Ready` object with the new items.

    Args:
        threads: the threads in which it runs.
        name: the handler's name, for the log.
        function: called in the thread; its result is the item, or an iterator of the items.
        arguments: the arguments of `function`.
        context: the request's context.
        variables: the context variables that the handler sees and sets.
        check: raises if an item does not fit the handler's annotation; None if there is nothing to check.

    Attributes:
        returned: the result of `function` if it has to run on the loop: an awaitable or an async iterable.
    """

    def __init__(
        self,
        threads: HandlerThreads,
        name: str,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        context: Context,
        variables: contextvars.Context,
        check: Callable[[Any], object] | None,
    ) -> None:
        super().__init__(name)
        self._threads = threads
        self._function: Callable[..., Any] | None = function
        self._arguments = arguments
        self._iterator: Iterator[Any] = iter(())
        self._context = context
        self._variables = variables
        self._check = check
        self._loop = asyncio.get_running_loop()
        self._ready = Ready()
        self._size = 0  # Bytes added since the reader had last taken all items.
        self._lent: Encoded | None = None  # The last item, if it refers to the handler's memory.
        self._tokens = False  # Items have resume tokens, which are written before their bodies.
        self._begun = self._stopping = False
        self._ended = False  # No more items come.
        self._left = False  # The thread has finished with this work.
        self._told = False  # The loop was woken since it last looked for items.
        self._error: BaseException | None = None  # The error that ended the items.
        self._error_of_close: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.returned: Any = None

    def __aiter__(self) -> PlainHandler:
        return self

    # Methods for the loop's thread.

    async def begin(self) -> bool:
        """Call the function. True: there are items, or it failed. False: the loop has to run `returned`.

        Raises:
            RuntimeError: the pool was closed, or the system has no thread.
        """
        self._threads.submit(self)
        self._begun = True
        await self._items()
        return self.returned is None

    async def __anext__(self) -> Ready:
        ready = self._ready
        if not ready:
            if not self._begun:
                await self.begin()
            self._threads.go_on(self)
            await self._items()
            if not ready:
                self._end()
        return ready

    def _end(self) -> None:
        error, self._error = self._error, None  # Raised once, not kept: its frames refer to this object.
        try:
            raise StopAsyncIteration if error is None else error
        finally:
            del error

    async def aclose(self) -> None:
        """Close the generator in its thread, after its current step: a thread cannot be interrupted.

        Raises:
            Exception: the generator raised it while it was closed.
        """
        self._stopping = True
        self._ready.clear()
        if not self._begun or self._threads.withdraw(self):
            self._left = True
        self._threads.go_on(self)
        while not self._left:
            self._told = False
            if not self._left:  # Checked again: the thread sets `_left` first and then looks at `_told`.
                await self._news()
        self._raise_error_of_close()

    def _raise_error_of_close(self) -> None:
        if self._error_of_close is not None:
            error, self._error_of_close = self._error_of_close, None
            try:
                raise error
            finally:
                del error

    async def _items(self) -> None:
        """Wait until there are items, or until no more come."""
        while not self._ready and not self._ended:
            self._told = False
            if not self._ready and not self._ended:  # Checked again, as in `aclose`.
                await self._news()

    async def _news(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # Methods for the handler's thread.

    def run(self) -> None:
        try:
            self._variables.run(self._compute)
        except (StopIteration, StopAsyncIteration) as error:  # Without translation they would look like a normal end.
            self._error = RuntimeError(f"the handler raised {type(error).__name__}")
            self._error.__cause__ = error
        except BaseException as error:
            if self._stopping:
                logger.debug("handler %s raised an error after its caller had left", self.name, exc_info=True)
            else:
                self._error = error

    def _compute(self) -> None:
        function, arguments, self._function, self._arguments = self._function, self._arguments, None, ()
        if self._stopping or function is None:
            return
        result = function(*arguments)
        if result.__class__ in VALUES:
            self._add(result)
        elif isinstance(result, AsyncIterable) or inspect.isawaitable(result):
            self.returned = result
        elif isinstance(result, Iterator):
            self._iterator = result
            del arguments, result
            self._iterate()
        else:
            self._add(result)

    def _iterate(self) -> None:
        iterator, self._iterator = self._iterator, iter(())
        item, ready, add = None, self._ready, self._add
        try:
            for item in iterator:
                if self._stopping:
                    break
                try:
                    add(item)
                except BaseException as error:  # The caller gets it, as from an async generator.
                    self._error, self._ended = error, True
                    self._tell()
                    break
                if not self._told:
                    self._tell()
                far_ahead = len(ready) >= AHEAD or self._size >= AHEAD_BYTES or self._lent is not None
                if far_ahead and self._wait_for_reader():
                    break
            else:
                return
            if isinstance(iterator, Generator):
                self._close(iterator)
        finally:
            del iterator, item  # The frames of an error would keep both alive, but they must be freed in this thread.

    def _wait_for_reader(self) -> bool:
        """Wait until all yielded items are sent. True: end instead of continuing."""
        self._threads.park(self)
        self._size, self._lent = 0, None
        return self._stopping

    def _close(self, iterator: Generator[Any, Any, Any]) -> None:
        try:
            iterator.close()
        except BaseException as error:
            self._error_of_close = error

    def _add(self, item: Any) -> None:
        """Check and encode an item, for the loop to send."""
        check, flags = self._check, 0
        if item.__class__ is Annotated:
            if check is not None and item.data() is not None:
                check(item.data())
            item, flags = parts(item), ANNOTATED
        elif check is not None:
            check(item)
        data = encode(item, "item")
        token = self._context.take_token()
        if token is not None:
            self._tokens = True
        if data.__class__ is bytes and len(data) <= SMALL and token is None and not flags:
            self._size += len(data)
            self._ready.append(data)
            return
        size = len(data) if isinstance(data, bytes) else data.nbytes
        encoded = Encoded(data, flags, token)
        if any(type(each.obj) is not bytes for each in encoded.buffers):  # The handler may change them.
            if not self._tokens and message_bytes(len(encoded.body), encoded.buffers) <= MAX_FRAME:
                # Sending it would make this copy anyway.
                encoded.body = one_frame(encoded.body, encoded.buffers)
                encoded.buffers, encoded.flags = [], flags | BUFFERS
            else:
                self._lent = encoded
        self._size += size
        self._ready.append(encoded)

    def must_wait(self) -> bool:
        return not self._stopping and (bool(self._ready) or (self._lent is not None and not self._lent.written))

    def stop(self) -> None:
        self._stopping = True
        if self._error is None:
            self._error = RuntimeError("the runtime was shut down")

    def left(self) -> None:
        self._ended = self._left = True
        if not self._told:
            self._tell()

    def _tell(self) -> None:
        self._told = True
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # The loop was closed while the thread could not be stopped. No reader is left.
            self._stopping = True


class Within:
    """An awaitable that runs each step of another one in `variables`, instead of the variables of the awaiting task.

    A context variable can be reset only in the context in which it was set. So an awaitable that a plain function has
    returned runs in the context of that function. No thread may be in that context at the same time.
    """

    __slots__ = ("_awaitable", "_variables")

    def __init__(self, variables: contextvars.Context, awaitable: Awaitable[Any]) -> None:
        self._variables = variables
        self._awaitable = awaitable

    def __await__(self) -> Generator[Any, Any, Any]:
        run = self._variables.run
        steps: Any = run(self._awaitable.__await__)
        step = partial(next, steps)
        while True:
            try:
                awaited = run(step)
            except StopIteration as end:
                return end.value
            finally:
                del step  # An error that the caller throws in refers to this frame.
            try:
                yield awaited
            except BaseException as error:  # Usually a cancellation.
                step = partial(steps.throw, error)
            else:
                step = partial(next, steps)


def changed(variables: contextvars.Context) -> bool:
    """Whether a variable has another value in `variables` than in the current context."""
    return any(variable.get(_MISSING) is not value for variable, value in variables.items())
