"""The decorators `triton_worker` and `triton_endpoint`."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar, cast, overload

import msgspec

from triton_distributed.errors import InvalidRequest
from triton_distributed.payload.codec import Message, decode, encode
from triton_distributed.payload.typed import RequestDecoder, typed_checker, typed_decoder
from triton_distributed.runtime.distributed import DistributedRuntime
from triton_distributed.serving.handlers import UnfitRequest
from triton_distributed.serving.signatures import CHECKS_ITSELF, Checks, item_hint, made

T = TypeVar("T")
P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., Any])


@overload
def triton_worker(function: Callable[Concatenate[Any, P], Awaitable[T]], /) -> Callable[P, Coroutine[Any, Any, T]]: ...


@overload
def triton_worker() -> Callable[[Callable[Concatenate[Any, P], Awaitable[T]]], Callable[P, Coroutine[Any, Any, T]]]: ...


def triton_worker(function: Callable[..., Awaitable[Any]] | None = None, /) -> Any:
    """Decorate `async def f(runtime, *args, **kwargs)`. Callers omit the runtime and call it inside a running loop.

    Both `@triton_worker()` and `@triton_worker` work. The runtime is made before `f` begins and closed when `f` returns
    or raises. While an endpoint is served, SIGTERM and SIGINT drain the runtime (`TRD_HANDLE_SIGNALS`). If `f` returns
    while it serves an endpoint that the program has not awaited, a warning is logged.

    Raises:
        TypeError: the decorated object is not a function.
    """
    if function is None:
        return triton_worker
    if not callable(function):
        raise TypeError(f"triton_worker decorates `async def f(runtime, …)`, not {function!r}")
    decorated = function

    @functools.wraps(decorated)
    async def worker(*args: Any, **kwargs: Any) -> Any:
        runtime = DistributedRuntime(asyncio.get_running_loop())
        try:
            result = await decorated(runtime, *args, **kwargs)
            runtime.warn_of_unawaited()
            return result
        finally:
            await runtime.close()

    return worker


def triton_endpoint(request_model: Any, response_model: Any) -> Callable[[F], F]:
    """Decorate a handler function or method whose last positional argument is the request.

    Args:
        request_model: the type of the request: a pydantic model, dataclass, Struct or any other type. A request, a JSON
            `str` or a dict, is parsed into it; one that has the type already is passed on unchanged.
        response_model: the type of the answer's items. Each item is checked against it, except text: programs may
            answer with JSON text, or with plain text despite a model, and this was never checked.

    Raises:
        TypeError: one of the two types cannot be checked; the text gives the reason.

    Raises (from the handler):
        ValueError: `Invalid request: …`, naming the field.
        TypeError: an answer does not fit `response_model`.
    """
    parse, decode_request = made("triton_endpoint: request_model", _parser, request_model)
    check = _but_text(made("triton_endpoint: response_model", typed_checker, item_hint(response_model)))

    def decorate(function: F) -> F:
        def parsed(args: tuple[Any, ...]) -> tuple[Any, ...]:
            if not args:
                raise UnfitRequest("", "the handler was called without a request")
            try:
                return (*args[:-1], parse(args[-1]))
            except InvalidRequest as error:
                raise UnfitRequest(error.target, error.reason) from error

        wrapper: Callable[..., Any]
        if inspect.isasyncgenfunction(function):

            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
                items = function(*parsed(args), **kwargs)
                try:
                    item = await anext(items)
                    while True:
                        if check is not None:
                            check(item)
                        thrown: BaseException | None = None
                        try:
                            yield item
                        except GeneratorExit:
                            raise
                        except BaseException as error:  # E.g. the cancellation, which the handler must see.
                            thrown = error
                        item = await (anext(items) if thrown is None else items.athrow(thrown))
                except StopAsyncIteration:
                    pass
                finally:
                    await items.aclose()  # Close it here, not in the garbage collector's task and context.
        elif inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                item = await function(*parsed(args), **kwargs)
                if check is not None:
                    check(item)
                return item
        elif inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                items = function(*parsed(args), **kwargs)
                try:
                    for item in items:
                        if check is not None:
                            check(item)
                        yield item
                finally:
                    items.close()
        else:

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                item = function(*parsed(args), **kwargs)
                if check is not None:
                    check(item)
                return item

        setattr(wrapper, CHECKS_ITSELF, Checks(wrapper, decode_request))
        return cast("F", wrapper)  # It is of the same kind and takes the same arguments.

    return decorate


def _but_text(check: Callable[[Any], object] | None) -> Callable[[Any], object] | None:
    """The check for all items except text, which passes unchecked."""
    return None if check is None else lambda item: None if isinstance(item, str) else check(item)


class _Parsed:
    """A request that was parsed while it was decoded."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def _parser(model: Any) -> tuple[Callable[[Any], Any], RequestDecoder]:
    """Return a parser for requests of a direct call, and a decoder that also parses, for requests of an endpoint.

    The decoder parses at once, because a model that was decoded to plain values may not be valid for its class.
    """
    decode_typed = typed_decoder(model)
    plain = model if isinstance(model, type) else None
    from_json = model not in (str, Any, object)

    def parse(request: Any) -> Any:
        if isinstance(request, _Parsed):
            return request.value
        if plain is not None and isinstance(request, plain):
            return request
        if isinstance(request, (str, bytes)) and from_json:
            try:
                request = msgspec.json.decode(request)
            except (msgspec.DecodeError, UnicodeEncodeError) as error:
                raise InvalidRequest("", f"it is not JSON: {error}") from error
        message = encode(request, "request")
        if isinstance(message, Message):
            return decode_typed(message.body, [bytearray(each) for each in message.buffers])
        return decode_typed(message)

    def decode_request(body: Any, buffers: Any = None) -> Any:
        if not len(body) or body[0] not in _MAPS_AND_LISTS:
            request = decode(body, buffers)
            if isinstance(request, (str, bytes)):
                return _Parsed(parse(request))
        return _Parsed(decode_typed(body, buffers))

    return parse, decode_request


_MAPS_AND_LISTS = frozenset({*range(0x80, 0xA0), *range(0xDC, 0xE0)})
"""First bytes of msgpack values that are maps or lists."""
