"""Calls without a connection object: in a handler, or in `async with trd.connect()`."""

from __future__ import annotations

from collections.abc import AsyncIterable
from typing import Any, TypeVar, Unpack, overload

from triton_distributed.api.connection import here
from triton_distributed.api.contracts import Bidirectional, Stream, Unary
from triton_distributed.api.options import StreamOptions, UnaryOptions
from triton_distributed.calling.item_stream import ItemStream

R = TypeVar("R")
A = TypeVar("A")


@overload
async def call(endpoint: Unary[R, A], request: R, **options: Unpack[UnaryOptions]) -> A: ...
@overload
async def call(endpoint: str, request: Any, **options: Unpack[UnaryOptions]) -> Any: ...


async def call(endpoint: Any, request: Any, **options: Any) -> Any:
    """Call an endpoint from a handler, or in `async with trd.connect()`; see `Connection.call`.

    Raises:
        RuntimeError: there is no connection here.
    """
    return await here().call(endpoint, request, **options)


@overload
def stream(endpoint: Stream[R, A], request: R, **options: Unpack[StreamOptions]) -> ItemStream[A]: ...
@overload
def stream(
    endpoint: Bidirectional[R, A], request: AsyncIterable[R], **options: Unpack[StreamOptions]
) -> ItemStream[A]: ...
@overload
def stream(endpoint: str, request: Any, **options: Unpack[StreamOptions]) -> ItemStream[Any]: ...


def stream(endpoint: Any, request: Any, **options: Any) -> ItemStream[Any]:
    """Call an endpoint from a handler, or in `async with trd.connect()`; see `Connection.stream`.

    Raises:
        RuntimeError: there is no connection here.
    """
    return here().stream(endpoint, request, **options)


async def send(endpoint: Unary[R, Any] | Stream[R, Any] | str, request: R, **options: Unpack[StreamOptions]) -> None:
    """Hand a request over and do not wait for its answer; see `Connection.send`.

    Raises:
        RuntimeError: there is no connection here.
    """
    await here().send(endpoint, request, **options)
