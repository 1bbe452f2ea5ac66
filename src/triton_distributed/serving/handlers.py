"""One interface to handlers of every kind: a request in, an async iterator of items out."""

from __future__ import annotations

import collections.abc
import contextvars
import functools
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

from triton_distributed.context import Context
from triton_distributed.errors import InvalidRequest
from triton_distributed.payload.passing import Passable
from triton_distributed.serving.inline import InlineHandler
from triton_distributed.serving.plain import VALUES, PlainHandler, Ready, Within, changed
from triton_distributed.serving.sender import Sender
from triton_distributed.serving.signatures import Types, read_signature
from triton_distributed.serving.threads import HandlerThreads


class UnfitRequest(InvalidRequest):
    """The decorator of a handler has found the request invalid: an error of the caller, not of the handler."""


class Handler:
    """The function that serves an endpoint, and the way to call it.

    Args:
        function: an async generator function, a coroutine function, a generator function or a plain function, also as
            a bound method, a partial or an object with `__call__`; its parameters are the request and, optionally, the
            context.
        threads: the threads in which plain functions run.
        declared: the types of the endpoint's contract; None to read the function's annotations.

    Attributes:
        function, threads: as given.
        name: its name in logs.
        on_loop: the function is an async function, of either kind.
        plain: runs it if it is not on the loop.
        takes_context: it gets the context.
        takes_stream: its request parameter is annotated as an async iterator: the caller streams requests to it.
        decode: bytes → request, checked against the annotation.
        check: item → None, raises if the item does not fit the annotation; None if there is nothing to check.

    Raises:
        TypeError: the function is not callable, does not take one or two positional arguments, or one of its
            annotations cannot be checked.
    """

    def __init__(self, function: Callable[..., Any], threads: HandlerThreads, declared: Types | None = None) -> None:
        if not callable(function):
            raise TypeError(f"a handler is a function, not {type(function).__name__}: {function!r}")
        self.name = getattr(function, "__qualname__", None) or repr(function)
        self.function = function
        self.threads = threads
        self.plain = InlineHandler if threads.inline else PlainHandler
        plain = _plain(function)
        self.on_loop = inspect.isasyncgenfunction(plain) or inspect.iscoroutinefunction(plain)
        self.is_coroutine = inspect.iscoroutinefunction(plain)
        self._is_asyncgen = inspect.isasyncgenfunction(plain)
        signature = read_signature(function, plain, self.name, declared)
        self.takes_context = signature.takes_context
        self.takes_stream, self.decode, self.check = signature.takes_stream, signature.decode, signature.check
        if keyword := signature.context_name:
            self.takes_context = True
            self.function = lambda request, context: function(request, **{keyword: context})

    def open(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """Begin to serve a request. The handler does not run before the first item is asked for."""
        if self._is_asyncgen:
            return self.function(request, context) if self.takes_context else self.function(request)  # type: ignore[no-any-return]
        return _Results(self, (request, context) if self.takes_context else (request,), context)


class _Results:
    """The items of a coroutine, a plain function, or a function that returns an iterator of some kind.

    Items of a plain function or iterator come as `plain.Ready`, encoded in their thread. All other items come as the
    handler made them.
    """

    __slots__ = ("_arguments", "_context", "_handler", "_inner", "_variables", "running")

    def __init__(self, handler: Handler, arguments: tuple[Any, ...], context: Context) -> None:
        self._handler = handler
        self._arguments: tuple[Any, ...] | None = arguments  # None after the function was called.
        self._context = context
        self._inner: Any = None
        self.running: Any = None  # The coroutine of a handler that is one, while it runs.
        self._variables: contextvars.Context | None = None  # The variables of `_inner`; None for the task's.

    def __aiter__(self) -> _Results:
        return self

    async def __anext__(self) -> Any:
        inner = self._inner
        if inner is None:
            return await self._first()
        if self._variables is None:
            return await inner.__anext__()
        return await Within(self._variables, inner.__anext__())

    async def _first(self) -> Any:
        arguments, self._arguments = self._arguments, None
        if arguments is None:
            raise StopAsyncIteration
        handler = self._handler
        try:
            if handler.on_loop:
                self.running = running = handler.function(*arguments)
                result = await running
                self.running = running = None
            else:
                result = await self._call(arguments)
        except StopAsyncIteration as error:  # Without translation it would look like a normal end.
            raise RuntimeError("the handler raised StopAsyncIteration") from error
        if self._inner is None:
            if result.__class__ in VALUES:
                return result
            if isinstance(result, Sender):
                self._inner = result.pushed
                del result  # A sender that the program drops ends the stream.
            elif isinstance(result, collections.abc.AsyncIterable):
                if handler.check is None and isinstance(result, Passable):
                    result.pass_on(Ready)
                self._inner = aiter(result)
            elif isinstance(result, collections.abc.Iterator):
                # The thread calls `iter`, so the whole iterator runs there.
                self._inner = self._in_thread(iter, (result,), self._variables or contextvars.copy_context())
                self._variables = None
            else:
                return result
        return await self.__anext__()

    async def _call(self, arguments: tuple[Any, ...]) -> Any:
        """Call a plain function. Afterwards its items are in `_inner`, or this method returns its result."""
        variables = contextvars.copy_context()
        plain = self._inner = self._in_thread(self._handler.function, arguments, variables)
        if await plain.begin():
            return None
        self._inner = None
        if (token := self._context.take_token()) is not None:
            self._context.attach_token(token)
        if changed(variables):  # The variables that the function has set apply to the awaitable it returned, too.
            self._variables = variables
        result = plain.returned
        if inspect.isawaitable(result):
            result = await (result if self._variables is None else Within(self._variables, result))
        return result

    def _in_thread(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], variables: contextvars.Context
    ) -> PlainHandler:
        handler = self._handler
        return handler.plain(
            handler.threads, handler.name, function, arguments, self._context, variables, handler.check
        )

    @property
    def inner(self) -> Any:
        """The iterator that the function returned, or None."""
        return self._inner

    async def athrow(self, error: BaseException) -> Any:
        """Raise `error` at the `yield` at which the returned iterator is suspended."""
        if self._inner is None or not hasattr(self._inner, "athrow"):
            raise error
        return await self._inner.athrow(error)

    async def aclose(self) -> None:
        if self._inner is not None and hasattr(self._inner, "aclose"):
            closing = self._inner.aclose()
            await (closing if self._variables is None else Within(self._variables, closing))


def _plain(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    if not (inspect.isfunction(function) or inspect.ismethod(function) or inspect.isbuiltin(function)):
        return getattr(function, "__call__", function)  # noqa: B004
    return function
