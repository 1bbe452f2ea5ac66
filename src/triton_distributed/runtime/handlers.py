"""A user's function, whatever its kind, as one thing: a request in, an async iterator of items out."""

from __future__ import annotations

import collections.abc
import functools
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

from triton_distributed.errors import InvalidRequest
from triton_distributed.runtime.context import Context
from triton_distributed.runtime.signatures import read_signature
from triton_distributed.runtime.threads import HandlerThreads, ThreadedIterator


class Misfit(InvalidRequest):
    """The request does not fit, as the handler's own decorator has found: its caller's fault, not the handler's."""


class Handler:
    """What is behind an endpoint.

    Args:
        function: an async generator function, a coroutine function, a generator function or a plain function, also as
            a bound method, a partial or an object with `__call__`; its parameters are the request and, optionally, the
            context.
        threads: where plain functions run.

    Attributes:
        name: for logs.
        takes_stream: its request parameter is annotated as an async iterator: the caller streams requests to it.
        decode: bytes → request, checked against the annotation.
        check: item → None, raises where it does not fit the annotation; None where there is nothing to check.

    Raises:
        TypeError: it is not callable, does not take one or two positional arguments, or one of its annotations cannot
            be checked.
    """

    def __init__(self, function: Callable[..., Any], threads: HandlerThreads) -> None:
        if not callable(function):
            raise TypeError(f"a handler is a function, not {type(function).__name__}: {function!r}")
        self.name = getattr(function, "__qualname__", None) or repr(function)
        self._function = function
        self._threads = threads
        plain = _plain(function)
        self._on_loop = inspect.isasyncgenfunction(plain) or inspect.iscoroutinefunction(plain)
        self._is_asyncgen = inspect.isasyncgenfunction(plain)
        self._takes_context, self.takes_stream, self.decode, self.check = read_signature(function, plain, self.name)

    def open(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """Begin to serve a request; nothing of the handler runs before the first item is asked for."""
        arguments = (request, context) if self._takes_context else (request,)
        if self._is_asyncgen:
            return self._function(*arguments)  # type: ignore[no-any-return]
        return _Results(self._function, arguments, self._on_loop, self._threads, context)


class _Results:
    """The items of a coroutine, a plain function, or a function that returns an iterator of some kind."""

    __slots__ = ("_arguments", "_context", "_function", "_inner", "_on_loop", "_threads")

    def __init__(
        self, function: Callable[..., Any], arguments: Any, on_loop: bool, threads: HandlerThreads, context: Context
    ) -> None:
        self._context = context
        self._function = function
        self._arguments = arguments  # None once it was called
        self._on_loop = on_loop
        self._threads = threads
        self._inner: Any = None

    def __aiter__(self) -> _Results:
        return self

    async def __anext__(self) -> Any:
        if self._inner is not None:
            return await self._inner.__anext__()
        arguments, self._arguments = self._arguments, None
        if arguments is None:
            raise StopAsyncIteration
        try:
            if self._on_loop:
                result = await self._function(*arguments)
            else:
                result = await self._threads.call(self._function, *arguments)
                if inspect.isawaitable(result):
                    result = await result
        except StopAsyncIteration as error:  # let through, it would look like a clean end
            raise RuntimeError("the handler raised StopAsyncIteration") from error
        if isinstance(result, collections.abc.AsyncIterable):
            self._inner = aiter(result)
        elif isinstance(result, (collections.abc.Generator, map, filter, zip)):
            self._inner = ThreadedIterator(self._threads, iter(result), self._context)
        else:
            return result
        return await self._inner.__anext__()

    @property
    def inner(self) -> Any:
        """The iterator that the function has returned, or None."""
        return self._inner

    async def athrow(self, error: BaseException) -> Any:
        """Raise `error` where the iterator that the function has returned is parked."""
        if self._inner is None or not hasattr(self._inner, "athrow"):
            raise error
        return await self._inner.athrow(error)

    async def aclose(self) -> None:
        if self._inner is not None and hasattr(self._inner, "aclose"):
            await self._inner.aclose()


def _plain(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    if not (inspect.isfunction(function) or inspect.ismethod(function) or inspect.isbuiltin(function)):
        return getattr(function, "__call__", function)  # noqa: B004
    return function
