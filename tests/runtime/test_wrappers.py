"""A handler behind a decorator or a wrapper is cleaned up as a bare one: in its own task and context, at once."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, patiently
from triton_distributed.runtime import current_context, triton_endpoint

TENANT: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="nobody")


class Noted:
    """What a handler saw while it ran and while it was cleaned up."""

    def __init__(self) -> None:
        self.ran_in: Any = None
        self.cleaned_in: Any = None
        self.raised: BaseException | None = None
        self.tenant = ""
        self.steps: list[str] = []
        self.done = asyncio.Event()

    async def endless(self, request: Any) -> AsyncIterator[Any]:
        self.ran_in = asyncio.current_task()
        token = TENANT.set("acme")
        try:
            while True:
                yield "x" * 1000
        except BaseException as error:
            self.raised = error
            raise
        finally:
            self.tenant = TENANT.get()
            TENANT.reset(token)  # raises in another context
            assert current_context() is not None
            await asyncio.sleep(0)
            self.cleaned_in = asyncio.current_task()
            self.steps.append("handler")
            self.done.set()


def bare(noted: Noted) -> Any:
    return noted.endless


def checked(noted: Noted) -> Any:
    return triton_endpoint(int, Any)(noted.endless)


def checked_twice(noted: Noted) -> Any:
    return triton_endpoint(int, Any)(triton_endpoint(int, Any)(noted.endless))


def returned_by_a_coroutine(noted: Noted) -> Any:
    async def handler(request: Any) -> AsyncIterator[Any]:
        return noted.endless(request)

    return handler


def returned_by_a_checked_coroutine(noted: Noted) -> Any:
    return triton_endpoint(int, Any)(returned_by_a_coroutine(noted))


def partial(noted: Noted) -> Any:
    async def handler(prefix: str, request: Any) -> AsyncIterator[Any]:
        items = noted.endless(request)
        try:
            async for item in items:
                yield prefix + item
        finally:
            await items.aclose()  # type: ignore[attr-defined]

    return functools.partial(triton_endpoint(int, Any)(handler), "a")


class Method:
    def __init__(self, noted: Noted) -> None:
        self._noted = noted

    @triton_endpoint(int, Any)
    async def generate(self, request: Any) -> AsyncIterator[Any]:
        items = self._noted.endless(request)
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()  # type: ignore[attr-defined]


def method(noted: Noted) -> Any:
    return Method(noted).generate


WRAPPED: list[Callable[[Noted], Any]] = [
    bare,
    checked,
    checked_twice,
    returned_by_a_coroutine,
    returned_by_a_checked_coroutine,
    partial,
    method,
]


@pytest.mark.any_loop
@pytest.mark.parametrize("wrap", WRAPPED)
async def test_clean_up_runs_in_the_handlers_task_and_context(wrap: Callable[[Noted], Any], cluster: Cluster) -> None:
    noted = Noted()
    client = await cluster.connect(wrap(noted))
    async for _ in client.generate(1):
        break
    await patiently(noted.done.wait())
    assert noted.cleaned_in is noted.ran_in
    assert noted.tenant == "acme"
    if wrap not in (method, partial):  # which close what they go over themselves, by GeneratorExit
        assert isinstance(noted.raised, asyncio.CancelledError)


async def test_an_answer_that_does_not_fit_closes_the_handler_at_once(cluster: Cluster) -> None:
    noted = Noted()
    client = await cluster.connect(triton_endpoint(int, int)(_floats(noted)))
    with pytest.raises(TypeError, match="response"):
        async for _ in client.generate(1):
            pass
    await patiently(noted.done.wait())
    assert noted.steps == ["closed"]


def _floats(noted: Noted) -> Any:
    async def handler(request: Any) -> AsyncIterator[Any]:
        try:
            yield 1
            yield 2.5
            yield 3
        finally:
            noted.steps.append("closed")
            noted.done.set()

    return handler


async def test_a_checked_plain_generator_is_closed_in_its_thread(cluster: Cluster) -> None:
    closed: list[str] = []
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    @triton_endpoint(int, Any)
    def handler(request: Any) -> Iterator[str]:
        try:
            while True:
                yield "x" * 1000
        finally:
            closed.append(threading.current_thread().name)
            loop.call_soon_threadsafe(done.set)

    client = await cluster.connect(handler)
    async for _ in client.generate(1):
        break
    await patiently(done.wait())
    assert closed[0].startswith("trd-handler")


async def test_a_checked_handler_may_catch_what_is_thrown_in_and_go_on() -> None:
    """As a unit test of a handler may do."""

    @triton_endpoint(int, Any)
    async def handler(request: Any) -> AsyncGenerator[str, None]:
        try:
            yield "first"
        except LookupError:
            yield "caught"
        yield "last"

    items = handler(1)
    assert await anext(items) == "first"
    assert await items.athrow(LookupError()) == "caught"
    assert [each async for each in items] == ["last"]
