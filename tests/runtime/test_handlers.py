"""Every kind of handler, through one path."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import msgspec
import pytest

from tests.runtime.cluster import Cluster, drained, patiently
from triton_distributed.runtime import Context


async def agen(request: int) -> AsyncIterator[int]:
    for i in range(request):
        yield i


async def agen_context(request: int, context: Context) -> AsyncIterator[int]:
    assert isinstance(context, Context)
    for i in range(request):
        yield i


async def coroutine(request: int) -> list[int]:
    return list(range(request))


async def coroutine_context(request: int, context: Context) -> list[int]:
    assert isinstance(context, Context)
    return list(range(request))


def generator(request: int) -> Iterator[int]:
    yield from range(request)


def generator_context(request: int, context: Context) -> Iterator[int]:
    assert isinstance(context, Context)
    yield from range(request)


def function(request: int) -> list[int]:
    return list(range(request))


def function_context(request: int, context: Context) -> list[int]:
    assert isinstance(context, Context)
    return list(range(request))


def returns_async_generator(request: int) -> AsyncIterator[int]:
    return agen(request)


def returns_generator(request: int) -> Iterator[int]:
    return generator(request)


def returns_awaitable(request: int) -> Awaitable[list[int]]:
    return coroutine(request)


async def returns_async_generator_later(request: int) -> AsyncIterator[int]:
    return agen(request)


def returns_map(request: int) -> Any:
    return map(int, range(request))


class Methods:
    async def agen(self, request: int) -> AsyncIterator[int]:
        for i in range(request):
            yield i

    async def agen_context(self, request: int, context: Context) -> AsyncIterator[int]:
        assert isinstance(context, Context)
        for i in range(request):
            yield i

    def generator(self, request: int) -> Iterator[int]:
        yield from range(request)

    async def coroutine(self, request: int) -> list[int]:
        return list(range(request))

    @staticmethod
    async def static(request: int) -> AsyncIterator[int]:
        for i in range(request):
            yield i

    @classmethod
    async def of_class(cls, request: int) -> AsyncIterator[int]:
        for i in range(request):
            yield i


class CallableAgen:
    async def __call__(self, request: int) -> AsyncIterator[int]:
        for i in range(request):
            yield i


class CallableContext:
    async def __call__(self, request: int, context: Context) -> list[int]:
        assert isinstance(context, Context)
        return list(range(request))


class CallablePlain:
    def __call__(self, request: int) -> Iterator[int]:
        yield from range(request)


async def model_first(model: str, request: int) -> AsyncIterator[int]:
    assert model == "m"
    for i in range(request):
        yield i


async def with_option(request: int, *, model: str = "") -> list[int]:
    assert model == "m"
    return list(range(request))


def logged(handler: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(handler)
    async def wrapper(request: Any) -> AsyncIterator[Any]:
        async for item in handler(request):
            yield item

    return wrapper


def passing(handler: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(handler)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return handler(*args, **kwargs)

    return wrapper


STREAMING = {
    "async generator": agen,
    "async generator, context": agen_context,
    "generator": generator,
    "generator, context": generator_context,
    "def returning an async generator": returns_async_generator,
    "def returning a generator": returns_generator,
    "async def returning an async generator": returns_async_generator_later,
    "def returning a map": returns_map,
    "bound async generator": Methods().agen,
    "bound async generator, context": Methods().agen_context,
    "bound generator": Methods().generator,
    "static method": Methods.static,
    "class method": Methods.of_class,
    "callable object": CallableAgen(),
    "callable object, plain": CallablePlain(),
    "partial": functools.partial(model_first, "m"),
    "partial of a partial": functools.partial(functools.partial(model_first), "m"),
    "wrapped": logged(agen),
    "wrapped by def": passing(agen),
    "wrapped by def, context": passing(agen_context),
}
UNARY = {
    "coroutine": coroutine,
    "coroutine, context": coroutine_context,
    "function": function,
    "function, context": function_context,
    "def returning an awaitable": returns_awaitable,
    "bound coroutine": Methods().coroutine,
    "callable object, context": CallableContext(),
    "partial": functools.partial(with_option, model="m"),
    "lambda": lambda request: list(range(request)),
    "wrapped by def": passing(coroutine),
}


@pytest.mark.any_loop
@pytest.mark.parametrize("kind", STREAMING)
async def test_streams(kind: str, cluster: Cluster) -> None:
    client = await cluster.connect(STREAMING[kind])
    assert await patiently(drained(client.generate(3, annotated=False))) == [0, 1, 2]
    assert await patiently(drained(client.generate(0))) == []
    assert len(await patiently(drained(client.generate(1000)))) == 1000


@pytest.mark.parametrize("kind", UNARY)
async def test_answers_with_one_value(kind: str, cluster: Cluster) -> None:
    client = await cluster.connect(UNARY[kind])
    assert await patiently(client.call(3)) == [0, 1, 2]
    assert await patiently(drained(client.generate(2, annotated=False))) == [[0, 1]]


async def test_a_builtin_is_a_handler(cluster: Cluster) -> None:
    client = await cluster.connect(len)
    assert await patiently(client.call("four")) == 4


async def test_plain_functions_run_beside_the_loop(cluster: Cluster) -> None:
    def where(request: Any) -> bool:
        return threading.current_thread() is threading.main_thread()

    async def on_loop(request: Any) -> bool:
        return threading.current_thread() is threading.main_thread()

    worker = await cluster.worker(where)
    await cluster.serve(worker, on_loop, "t.c.loop")
    assert await patiently((await cluster.client()).call(None)) is False
    assert await patiently((await cluster.client("t.c.loop")).call(None)) is True


@pytest.mark.parametrize(
    "bad", [None, 5, "text", lambda: None, lambda a, b, c: None], ids=["None", "int", "str", "no parameter", "three"]
)
async def test_what_cannot_be_a_handler_is_refused_by_the_call_itself(bad: Any, cluster: Cluster) -> None:
    with pytest.raises(TypeError, match="handler"):
        cluster.runtime().endpoint("t.c.e").serve_endpoint(bad)


@pytest.mark.parametrize("limits", [{"max_inflight": 0}, {"max_inflight": -1}, {"max_queue": -1}])
async def test_limits_below_their_least_are_refused(limits: dict[str, Any], cluster: Cluster) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(limits))}="):
        cluster.runtime().endpoint("t.c.e").serve_endpoint(agen, **limits)


async def test_a_handler_that_yields_nothing_ends_cleanly(cluster: Cluster) -> None:
    async def silent(request: Any) -> AsyncIterator[int]:
        return
        yield

    client = await cluster.connect(silent)
    assert await patiently(drained(client.generate(None))) == []


class Large(msgspec.Struct, weakref=True):
    data: bytes


async def test_a_handler_that_drops_its_request_frees_it(cluster: Cluster) -> None:
    async def handler(request: Large) -> AsyncIterator[bool]:
        held = weakref.ref(request)
        del request
        yield held() is None

    client = await cluster.connect(handler)
    assert await patiently(drained(client.generate(Large(b"data"), annotated=False))) == [True]


async def test_one_runtime_serves_many_endpoints_under_one_id(cluster: Cluster) -> None:
    worker = await cluster.worker(agen, "t.c.generate")
    await cluster.serve(worker, function, "t.c.generate2")
    await cluster.serve(worker, coroutine, "t.d.generate")
    assert {
        tuple((await cluster.client(name)).instance_ids()) for name in ("t.c.generate", "t.c.generate2", "t.d.generate")
    } == {(worker.instance_id,)}
    assert await patiently(drained((await cluster.client("t.c.generate")).generate(2, annotated=False))) == [0, 1]
    assert await patiently((await cluster.client("t.c.generate2")).call(2)) == [0, 1]
