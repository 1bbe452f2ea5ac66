"""A user's function, whatever its kind, as one thing: a request in, an async iterator of items out."""

from __future__ import annotations

import collections.abc
import contextvars
import functools
import inspect
import typing
from collections.abc import AsyncIterator, Callable
from typing import Any

from triton_distributed.errors import InvalidRequest
from triton_distributed.runtime.context import Context
from triton_distributed.runtime.plain import VALUES, PlainHandler, Within, changed
from triton_distributed.runtime.threads import HandlerThreads
from triton_distributed.wire.typed import typed_checker, typed_decoder

#: Set on a function whose request and response are checked by itself; see `decorators.triton_endpoint`.
CHECKS_ITSELF = "__triton_checks_itself__"

_STREAMS = (
    collections.abc.AsyncIterator,
    collections.abc.AsyncIterable,
    collections.abc.AsyncGenerator,
    collections.abc.Iterator,
    collections.abc.Iterable,
    collections.abc.Generator,
)
_REQUEST_STREAMS = _STREAMS[:3]


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
        function, threads: as given.
        name: for logs.
        on_loop: it is an async function, of either kind.
        takes_stream: its request parameter is annotated as an async iterator: the caller streams requests to it.
        decode: bytes → request, checked against the annotation.
        check: item → None, raises where it does not fit the annotation; None where there is nothing to check.

    Raises:
        TypeError: it is not callable, or does not take one or two positional arguments.
    """

    def __init__(self, function: Callable[..., Any], threads: HandlerThreads) -> None:
        if not callable(function):
            raise TypeError(f"a handler is a function, not {type(function).__name__}: {function!r}")
        self.name = getattr(function, "__qualname__", None) or repr(function)
        self.function = function
        self.threads = threads
        plain = _plain(function)
        self.on_loop = inspect.isasyncgenfunction(plain) or inspect.iscoroutinefunction(plain)
        self._is_asyncgen = inspect.isasyncgenfunction(plain)
        self._takes_context, request_type, response_type = _signature(function, plain, self.name)
        self.takes_stream = typing.get_origin(request_type) in _REQUEST_STREAMS or request_type in _REQUEST_STREAMS
        if self.takes_stream:
            request_type = _element(request_type)
        if self._is_asyncgen or inspect.isgeneratorfunction(plain) or _is_stream(response_type):
            response_type = _element(response_type)
        self.decode = typed_decoder(request_type)
        self.check = typed_checker(response_type)

    def open(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """Begin to serve a request; nothing of the handler runs before the first item is asked for."""
        arguments = (request, context) if self._takes_context else (request,)
        if self._is_asyncgen:
            return self.function(*arguments)  # type: ignore[no-any-return]
        return _Results(self, arguments, context)


class _Results:
    """The items of a coroutine, a plain function, or a function that returns an iterator of some kind.

    Items of a plain function or iterator come as `plain.Ready`, encoded in their thread; all others as they are.
    """

    __slots__ = ("_arguments", "_context", "_handler", "_inner", "_variables")

    def __init__(self, handler: Handler, arguments: tuple[Any, ...], context: Context) -> None:
        self._handler = handler
        self._arguments: tuple[Any, ...] | None = arguments  # None once it was called
        self._context = context
        self._inner: Any = None
        self._variables: contextvars.Context | None = None  # those in which `_inner` runs; None for the task's own

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
                result = await handler.function(*arguments)
            else:
                result = await self._call(arguments)
        except StopAsyncIteration as error:  # let through, it would look like a clean end
            raise RuntimeError("the handler raised StopAsyncIteration") from error
        if self._inner is None:
            if result.__class__ in VALUES:
                return result
            if isinstance(result, collections.abc.AsyncIterable):
                self._inner = aiter(result)
            elif isinstance(result, collections.abc.Iterator):
                # `iter` is called in the thread: the iterator runs there from its first step on.
                self._inner = self._in_thread(iter, (result,), self._variables or contextvars.copy_context())
                self._variables = None
            else:
                return result
        return await self.__anext__()

    async def _call(self, arguments: tuple[Any, ...]) -> Any:
        """Call a plain function. Its items are in `_inner`, or else it returned this."""
        variables = contextvars.copy_context()
        plain = self._inner = self._in_thread(self._handler.function, arguments, variables)
        if await plain.begin():
            return None
        self._inner = None
        if (token := self._context.take_token()) is not None:
            self._context.attach_token(token)
        if changed(variables):  # what the function has set holds for what it returned as well
            self._variables = variables
        result = plain.returned
        if inspect.isawaitable(result):
            result = await (result if self._variables is None else Within(self._variables, result))
        return result

    def _in_thread(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], variables: contextvars.Context
    ) -> PlainHandler:
        handler = self._handler
        return PlainHandler(handler.threads, handler.name, function, arguments, self._context, variables, handler.check)

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


def _signature(function: Any, plain: Any, name: str) -> tuple[bool, Any, Any]:
    """Whether it takes a context, and the annotations of its request and of what it returns."""
    try:
        signature = inspect.signature(function, follow_wrapped=False)
        if any(each.kind == each.VAR_POSITIONAL for each in signature.parameters.values()):
            signature = inspect.signature(function)  # a wrapper that passes on what it gets
    except (TypeError, ValueError):
        return False, Any, Any  # a builtin without a signature: call it with the request
    positional = [
        each
        for each in signature.parameters.values()
        if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    rest = any(each.kind == each.VAR_POSITIONAL for each in signature.parameters.values())
    needed = sum(each.default is each.empty for each in positional)
    if (not positional and not rest) or needed > 2:
        raise TypeError(f"handler {name} takes {needed} arguments; a handler takes a request and optionally a context")
    takes_context = len(positional) > 1 and (
        positional[1].default is inspect.Parameter.empty or positional[1].name in ("context", "ctx")
    )
    if getattr(plain, CHECKS_ITSELF, False) or not positional:
        return takes_context, Any, Any
    hints = _hints(plain, signature)
    return takes_context, hints.get(positional[0].name, Any), hints.get("return", Any)


def _hints(plain: Any, signature: inspect.Signature) -> dict[str, Any]:
    try:
        return typing.get_type_hints(inspect.unwrap(plain) if inspect.isfunction(plain) else plain)
    except Exception:  # a name that only a type checker knows: what cannot be resolved is not enforced
        hints = {each.name: each.annotation for each in signature.parameters.values()}
        hints["return"] = signature.return_annotation
        return {k: v for k, v in hints.items() if v is not inspect.Parameter.empty and not isinstance(v, str)}


def _is_stream(hint: Any) -> bool:
    return typing.get_origin(hint) in _STREAMS or hint in _STREAMS


def _element(hint: Any) -> Any:
    if hint is Any:
        return Any
    arguments = typing.get_args(hint)
    return arguments[0] if arguments and _is_stream(hint) else Any
