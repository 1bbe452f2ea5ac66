"""`dynamo_worker`, `dynamo_endpoint` and the helpers for unary endpoints."""

from __future__ import annotations

import asyncio
import functools
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from triton_distributed.compat.dynamo.client import Client
from triton_distributed.compat.dynamo.contexts import Context
from triton_distributed.compat.dynamo.endpoints import DistributedRuntime, Endpoint

P = ParamSpec("P")
T = TypeVar("T")


def dynamo_worker(
    enable_nats: bool | None = None,
) -> Callable[[Callable[Concatenate[Any, P], Awaitable[T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Decorate `async def f(runtime, *args, **kwargs)`. The runtime is made before `f` begins and closed after it.

    `DYN_DISCOVERY_BACKEND` and `DYN_REQUEST_PLANE` choose the backends, unless this runtime's own settings do.

    Args:
        enable_nats: not used; it gives a DeprecationWarning, as in Dynamo.
    """
    if enable_nats is not None:
        warnings.warn("enable_nats= is not used: the settings decide", DeprecationWarning, stacklevel=2)

    def decorate(function: Callable[Concatenate[Any, P], Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        @functools.wraps(function)
        async def worker(*args: P.args, **kwargs: P.kwargs) -> T:
            runtime = DistributedRuntime(asyncio.get_running_loop())
            try:
                result = await function(runtime, *args, **kwargs)
                runtime.native.warn_of_unawaited()
                return result
            finally:
                await runtime.native.close()

        return worker

    return decorate


def dynamo_endpoint(request_model: Any, response_model: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate an async generator function or method whose last positional argument is the request.

    Args:
        request_model: a pydantic model: the request, JSON text or a dict, is parsed into it. Any other type passes the
            request on unchanged.
        response_model: not enforced, as in Dynamo.

    Raises (from the first item):
        ValueError: `Invalid request: …`.
    """
    is_model = isinstance(request_model, type) and hasattr(request_model, "model_validate_json")

    def parse(request: Any) -> Any:
        try:
            if isinstance(request, str):
                return request_model.model_validate_json(request)
            if isinstance(request, dict):
                return request_model.model_validate(request)
        except ValueError as error:  # pydantic's ValidationError is one.
            raise ValueError(f"Invalid request: {error}") from None
        raise ValueError(f"Invalid request: {request!r} is neither JSON text nor a dict")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            if is_model and len(args) in (1, 2):
                args = (*args[:-1], parse(args[-1]))
            items = function(*args, **kwargs)
            try:
                async for item in items:
                    yield item
            finally:
                await items.aclose()

        return wrapper

    return decorate


class _UnaryHandler(Protocol):
    async def __call__(self, request: Any, *, context: Context) -> Any: ...


def serve_unary_endpoint(endpoint: Endpoint, handler: _UnaryHandler) -> Awaitable[None]:
    """Serve `async def handler(request, *, context)`, whose result is the one response."""

    async def generate(request: Any, *, context: Context) -> AsyncIterator[Any]:
        yield await handler(request, context=context)

    return endpoint.serve_endpoint(generate)


class UnaryClient:
    """Calls the instances of an endpoint in turn and returns the one response of each call."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def complete(self, request: Any, *, context: Context | None = None) -> Any:
        """Call and return the response.

        Raises:
            RuntimeError: there is no response, or more than one.
            ValueError: see `AsyncResponseStream`.
        """
        stream = await self._client.round_robin(request, annotated=False, context=context)
        try:
            response = await anext(stream, _NOTHING)
            if response is _NOTHING:
                raise RuntimeError("unary endpoint returned no response")
            if await anext(stream, _NOTHING) is not _NOTHING:
                raise RuntimeError("unary endpoint returned multiple responses")
            return response
        finally:
            await stream.aclose()


_NOTHING: Any = object()
