"""What a handler raises is what its caller catches."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.runtime import exceptions_apart
from tests.runtime.cluster import Cluster, drained, into, patiently
from triton_distributed.errors import InvalidRequest, NoInstances, RemoteError

numbers = itertools.count()


class Here(Exception):
    """A type that caller and handler share."""


def raising(error: Any) -> Any:
    async def handler(request: Any) -> AsyncIterator[int]:
        yield 1
        raise error

    return handler


async def raised_by(cluster: Cluster, handler: Any) -> RemoteError:
    name = f"t.c.e{next(numbers)}"
    await cluster.worker(handler, name)
    client = await cluster.client(name)
    with pytest.raises(RemoteError) as caught:
        await patiently(drained(client.generate(1)))
    assert isinstance(caught.value, ValueError)
    return caught.value


BUILT_IN = [
    ValueError("w is not allowed"),
    KeyError("w"),
    TypeError("no"),
    RuntimeError("no"),
    ZeroDivisionError("division by zero"),
    FileNotFoundError(2, "No such file", "/models/none"),
    TimeoutError("too long"),
    ConnectionResetError(104, "reset"),
    NotImplementedError("later"),
    AssertionError("never"),
    MemoryError("all of it"),
    RecursionError("deep"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    OSError(28, "No space left on device"),
    ImportError("no module", name="m"),
    AttributeError("no attribute"),
    LookupError(),
    Exception("plain"),
    StopAsyncIteration("odd"),
    StopIteration("odd"),
]


@pytest.mark.parametrize("error", BUILT_IN, ids=lambda each: type(each).__name__)
async def test_built_in_types_are_themselves(error: Exception, cluster: Cluster) -> None:
    caught = await raised_by(cluster, raising(error))
    kind = RuntimeError if isinstance(error, (StopIteration, StopAsyncIteration)) else type(error)
    assert isinstance(caught, kind)
    assert str(error) in str(caught) or kind is RuntimeError
    assert kind.__name__ in str(caught)


@pytest.mark.any_loop
async def test_an_error_tells_all_it_knows(cluster: Cluster) -> None:
    worker = cluster.runtime()
    ids = []

    async def handler(request: Any, context: Any) -> AsyncIterator[int]:
        ids.append(context.id())
        yield 1
        raise KeyError("w is not allowed")

    await cluster.serve(worker, handler)
    client = await cluster.client()
    items: list[Any] = []
    with pytest.raises(KeyError) as caught:
        await into(items, client.generate(1, annotated=False))
    error: Any = caught.value
    assert items == [1]
    assert (error.type_name, error.message) == ("KeyError", "'w is not allowed'")
    assert error.instance_id == worker.instance_id
    assert [error.request_id] == ids
    assert "in handler" in error.remote_traceback
    assert any("in handler" in note for note in error.__notes__)


async def test_the_text_is_type_and_message(cluster: Cluster) -> None:
    assert str(await raised_by(cluster, raising(ValueError("w is not allowed")))) == "ValueError: w is not allowed"


async def test_items_before_the_error_arrive_before_it(cluster: Cluster) -> None:
    async def handler(request: Any) -> AsyncIterator[Any]:
        for i in range(100):
            yield i
        yield b"x" * 300_000
        yield "last"
        raise LookupError("then this")

    client = await cluster.connect(handler)
    items: list[Any] = []
    with pytest.raises(LookupError, match="then this"):
        await into(items, client.generate(1, annotated=False))
    assert len(items) == 102
    assert items[-1] == "last"


async def test_after_its_error_a_stream_is_over_as_a_generator_is(cluster: Cluster) -> None:
    client = await cluster.connect(raising(KeyError("once")))
    stream = client.generate(1)
    await patiently(anext(stream))
    with pytest.raises(KeyError):
        await patiently(anext(stream))
    with pytest.raises(StopAsyncIteration):
        await patiently(anext(stream))


async def test_a_users_own_type_is_itself_where_it_is_imported(cluster: Cluster) -> None:
    assert isinstance(await raised_by(cluster, raising(Here("mine"))), Here)
    odd = await raised_by(cluster, raising(exceptions_apart.Odd(needed=3, given="two")))
    assert isinstance(odd, exceptions_apart.Odd)
    assert (odd.needed, odd.given) == (3, "two")
    lookup = await raised_by(cluster, raising(exceptions_apart.OddLookup("w", {"a": 1})))
    assert isinstance(lookup, exceptions_apart.OddLookup)
    assert "w is not among 1" in str(lookup)


async def test_a_users_own_type_is_its_nearest_known_base_where_it_is_not_imported(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd, lookup = exceptions_apart.Odd(needed=3, given="two"), exceptions_apart.OddLookup("w", {})
    monkeypatch.delitem(sys.modules, "tests.runtime.exceptions_apart")
    caught: Any = await raised_by(cluster, raising(odd))
    assert not isinstance(caught, exceptions_apart.Odd)
    assert (caught.type_name, str(caught)) == ("Odd", "Odd: 3 were needed, two came")
    caught = await raised_by(cluster, raising(lookup))
    assert isinstance(caught, LookupError)
    assert isinstance(caught, RemoteError)
    assert caught.type_name == "OddLookup"
    assert "tests.runtime.exceptions_apart" not in sys.modules


async def test_a_local_type_arrives_by_its_base(cluster: Cluster) -> None:
    class Local(ArithmeticError):
        pass

    caught = await raised_by(cluster, raising(Local("here only")))
    assert isinstance(caught, ArithmeticError)
    assert caught.type_name == "Local"


async def test_a_group_arrives_with_its_text(cluster: Cluster) -> None:
    caught = await raised_by(cluster, raising(ExceptionGroup("several", [KeyError("a"), ValueError("b")])))
    assert "several" in str(caught)
    assert caught.type_name == "ExceptionGroup"
    assert "KeyError: 'a'" in caught.remote_traceback
    assert "ValueError: b" in caught.remote_traceback


async def test_a_task_groups_error_reaches_the_caller(cluster: Cluster) -> None:
    async def handler(request: Any) -> None:
        async def fails() -> None:
            raise KeyError("in a task")

        async with asyncio.TaskGroup() as group:
            group.create_task(fails())

    client = await cluster.connect(handler)
    with pytest.raises(RemoteError, match="ExceptionGroup"):
        await patiently(client.call(1))


async def test_hops_pass_the_first_error_on(cluster: Cluster) -> None:
    async def inner(request: Any) -> AsyncIterator[int]:
        yield 1
        raise Here("deep down")

    def passing(to: str) -> Any:
        async def handler(request: Any) -> AsyncIterator[Any]:
            async for item in (await cluster.client(to)).generate(request, annotated=False):
                yield item

        return handler

    await cluster.worker(inner, "t.c.inner")
    await cluster.worker(passing("t.c.inner"), "t.c.middle")
    await cluster.worker(passing("t.c.middle"), "t.c.outer")
    client = await cluster.client("t.c.outer")
    with pytest.raises(Here) as caught:
        await patiently(drained(client.generate(1)))
    assert str(caught.value) == "Here: deep down"
    assert "in inner" in "".join(caught.value.__notes__)


async def test_an_error_of_the_runtime_passes_through_a_hop_as_itself(cluster: Cluster) -> None:
    async def handler(request: Any) -> Any:
        client = await cluster.caller.endpoint("t.c.nobody").client()
        return await client.call(1)

    client = await cluster.connect(handler)
    with pytest.raises(NoInstances, match='no endpoints found for endpoint "t/components/c/nobody"'):
        await patiently(client.call(1))


async def test_errors_of_every_kind_of_handler(cluster: Cluster) -> None:
    async def coroutine(request: Any) -> None:
        raise KeyError("c")

    def function(request: Any) -> None:
        raise KeyError("f")

    def generator(request: Any) -> Iterator[int]:
        yield 1
        raise KeyError("g")

    async def before_the_first(request: Any) -> AsyncIterator[int]:
        raise KeyError("b")
        yield 1  # type: ignore[unreachable]

    for number, handler in enumerate((coroutine, function, generator, before_the_first)):
        await cluster.worker(handler, f"t.c.e{number}")
        client = await cluster.client(f"t.c.e{number}")
        with pytest.raises(KeyError) as caught:
            await patiently(drained(client.generate(1)))
        assert handler.__name__ in caught.value.remote_traceback  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
async def test_an_iterators_end_that_leaks_out_of_a_handler_is_an_error(kind: Any, cluster: Cluster) -> None:
    """As from a generator, see PEP 479: else it would pass for a clean end, or hang."""

    async def coroutine(request: Any) -> None:
        raise kind

    def function(request: Any) -> None:
        raise kind

    for number, handler in enumerate((coroutine, function)):
        await cluster.worker(handler, f"t.c.e{number}")
        client = await cluster.client(f"t.c.e{number}")
        with pytest.raises(RuntimeError) as caught:
            await patiently(drained(client.generate(1)))
        assert isinstance(caught.value, RemoteError)


async def test_an_error_whose_own_methods_raise(cluster: Cluster) -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

        __repr__ = __str__

    caught = await raised_by(cluster, raising(Broken()))
    assert caught.type_name == "Broken"


async def test_a_handler_that_is_cancelled_by_its_own_code_is_no_clean_end(cluster: Cluster) -> None:
    async def handler(request: Any) -> AsyncIterator[int]:
        yield 1
        raise asyncio.CancelledError

    client = await cluster.connect(handler)
    with pytest.raises(RemoteError, match="CancelledError") as caught:
        await patiently(drained(client.generate(1)))
    assert not isinstance(caught.value, asyncio.CancelledError)
    assert "raise asyncio.CancelledError" in caught.value.remote_traceback


async def test_a_worker_goes_on_after_errors(cluster: Cluster) -> None:
    async def handler(request: int) -> int:
        return 10 // request

    worker = await cluster.worker(handler)
    client = await cluster.client()
    for _ in range(50):
        with pytest.raises(ZeroDivisionError):
            await patiently(client.call(0))
        assert await patiently(client.call(5)) == 2
    stats = worker.stats()["t/components/c/e"]
    assert (stats.outcomes()["ok"], stats.outcomes()["error"], stats.inflight) == (50, 50, 0)


async def test_the_request_id_is_the_one_that_the_handler_saw(cluster: Cluster) -> None:
    seen = []

    async def inner(request: Any, context: Any) -> None:
        seen.append(context.id())
        raise KeyError("inner")

    async def outer(request: Any, context: Any) -> str:
        context.id()
        try:
            await (await cluster.client("t.c.inner")).call(1, metadata={"k": 1})
        except KeyError as error:
            return str(error.request_id)  # type: ignore[attr-defined]
        return ""

    await cluster.worker(inner, "t.c.inner")
    await cluster.worker(outer, "t.c.outer")
    assert await patiently((await cluster.client("t.c.outer")).call(1)) == seen[0]


async def test_what_a_handler_raises_is_logged_at_the_worker(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Any) -> None:
        raise KeyError(request)

    client = await cluster.connect(handler)
    for n in range(50):
        with pytest.raises(KeyError):
            await patiently(client.call(n))
    told = [each for each in caplog.records if each.levelname == "WARNING" and "the handler raised" in each.message]
    assert len(told) == 1  # not fifty times within seconds
    assert told[0].exc_info is not None
    assert "t.c.e" in told[0].message


async def test_an_invalid_request_names_the_endpoint(cluster: Cluster) -> None:
    async def handler(request: int) -> int:
        return request

    client = await cluster.connect(handler)
    with pytest.raises(InvalidRequest, match='Invalid request: endpoint "t/components/c/e": request: Expected `int`'):
        await patiently(client.call("x"))
