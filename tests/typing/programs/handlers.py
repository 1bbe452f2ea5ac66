"""Handlers that `serve_endpoint` takes, and what the decorators keep of the functions that they decorate."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, assert_type

from triton_distributed.runtime import Context, DistributedRuntime, Endpoint, triton_endpoint, triton_worker


@dataclass
class Prompt:
    text: str


async def stream(request: Prompt) -> AsyncIterator[str]:
    yield request.text


async def unary(request: Prompt, context: Context) -> str:
    return request.text + context.id()


def plain(request: Prompt, *, context: Context) -> Iterator[str]:
    yield request.text + context.id()


def named(request: Any, ctx: Context | None = None, extra: int = 0) -> Any:
    return request, ctx, extra


async def short(request: Prompt, *, ctx: Context) -> None: ...


async def both_ways(requests: AsyncIterator[Prompt], context: object) -> AsyncIterator[str]:
    async for each in requests:
        yield each.text


class Service:
    async def generate(self, request: Prompt) -> AsyncIterator[str]:
        yield request.text

    def __call__(self, request: Prompt, context: Context) -> str:
        return request.text

    @triton_endpoint(Prompt, str)
    async def decorated(self, request: Prompt) -> AsyncIterator[str]:
        yield request.text


async def of_three(request: Prompt, context: Context, third: int) -> str:
    return request.text


async def of_none() -> str:
    return ""


def of_another_context(request: Prompt, context: int) -> str:
    return request.text * context


def of_keyword(request: Prompt, *, tenant: str) -> str:
    return request.text + tenant


async def serves(endpoint: Endpoint) -> None:
    await endpoint.serve_endpoint(stream)
    await endpoint.serve_endpoint(unary, graceful_shutdown=False, max_inflight=8, max_queue=1, metadata={"a": 1})
    await endpoint.serve_endpoint(plain, True, None, max_inflight=None)
    await endpoint.serve_endpoint(named)
    await endpoint.serve_endpoint(short)
    await endpoint.serve_endpoint(both_ways)
    await endpoint.serve_endpoint(Service().generate)
    await endpoint.serve_endpoint(Service())
    await endpoint.serve_endpoint(Service().decorated)
    await endpoint.serve_endpoint(functools.partial(of_three, third=3))
    await endpoint.serve_endpoint(lambda request: request)


async def slips(endpoint: Endpoint) -> None:
    await endpoint.serve_endpoint(of_three)  # refused: arg-type, reportArgumentType
    await endpoint.serve_endpoint(of_none)  # refused: arg-type, reportArgumentType
    await endpoint.serve_endpoint(of_another_context)  # refused: arg-type, reportArgumentType
    await endpoint.serve_endpoint(of_keyword)  # refused: arg-type, reportArgumentType
    await endpoint.serve_endpoint(5)  # refused: arg-type, reportArgumentType
    await endpoint.serve_endpoint(stream, max_infligth=8)  # refused: call-arg, reportCallIssue
    await endpoint.serve_endpoint(stream, max_queue=None)  # refused: arg-type, reportArgumentType


@triton_endpoint(Prompt, str)
async def decorated(request: Prompt) -> AsyncIterator[str]:
    yield request.text


@triton_endpoint(Prompt, str)
async def decorated_unary(request: Prompt) -> str:
    return request.text


async def direct_calls() -> None:
    assert_type(await decorated_unary(Prompt("a")), str)
    async for item in decorated(Prompt("a")):
        assert_type(item, str)
    async for item in Service().decorated(Prompt("a")):
        assert_type(item, str)
    await decorated_unary(5)  # refused: arg-type, reportArgumentType
    print((await decorated_unary(Prompt("a"))).txt)  # refused: attr-defined, reportAttributeAccessIssue
    Service().decorated()  # refused: call-arg, reportCallIssue


@triton_worker()
async def worker(runtime: DistributedRuntime, name: str, *, times: int = 1) -> int:
    return len(name) * times


@triton_worker
async def bare(runtime: DistributedRuntime) -> None: ...


async def workers() -> None:
    assert_type(await worker("a", times=2), int)
    assert_type(worker, Callable[..., Coroutine[Any, Any, int]])  # refused: assert-type, reportAssertTypeFailure
    await bare()
    await worker(1)  # refused: arg-type, reportArgumentType
    await worker("a", time=2)  # refused: call-arg, reportCallIssue
    await bare(1)  # refused: call-arg, reportCallIssue
