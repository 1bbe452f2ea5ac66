"""What travels, how large, and what is said of the rest."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.runtime.cluster import Cluster, drained, into, patiently, until
from triton_distributed.errors import MessageTooLarge

KIB = 1024


async def echo(request: Any) -> Any:
    return request


async def echo_stream(request: Any) -> AsyncIterator[Any]:
    yield request
    yield "after"


VALUES: list[Any] = [
    True,
    -1,
    2**63,
    1.5,
    "text ü 🙂",
    b"bytes",
    [],
    {},
    [1, [2, [3, None]]],
    {"a": {"b": [1, 2]}, "c": None},
    {1: "a", b"k": "b"},
    datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC),
]


@pytest.mark.any_loop
async def test_plain_values_arrive_as_they_were(cluster: Cluster) -> None:
    client = await cluster.connect(echo)
    for value in VALUES:
        found = await patiently(client.call(value))
        assert found == value
        assert type(found) is type(value)


SIZES = [
    0,
    1,
    60 * KIB,
    64 * KIB - 100,
    64 * KIB,
    66_000,
    100 * KIB,
    200_000,
    256 * KIB - 200,
    256 * KIB - 60,
    256 * KIB - 40,
    256 * KIB - 8,
    256 * KIB,
    256 * KIB + 1,
    512 * KIB - 10,
    512 * KIB,
    3_000_000,
]


@pytest.mark.parametrize("kind", ["str", "bytes", "list", "array"])
@pytest.mark.parametrize("where", ["memory", "unix", "tcp"])
async def test_every_size(where: str, kind: str, cluster: Cluster, unix: Cluster) -> None:
    if where == "unix":
        client = await unix.connect(echo)
    elif where == "tcp":
        worker = unix.runtime(listen="tcp://127.0.0.1:0")
        await unix.serve(worker, echo)
        client = await unix.client()
    else:
        client = await cluster.connect(echo)
    for size in SIZES:
        value: Any = {
            "str": lambda n: "x" * n,
            "bytes": lambda n: b"x" * n,
            "list": lambda n: [7] * n,
            "array": lambda n: np.arange(n, dtype=np.uint8),
        }[kind](size if kind != "list" or size < 600_000 else 600_000)
        found = await patiently(client.call(value))
        same = np.array_equal(found, value) if kind == "array" else found == value
        assert same, f"{kind} of {size} bytes"


async def test_many_sizes_at_once_over_one_session(unix: Cluster) -> None:
    """Large requests wait for the socket while small ones are made: nothing is mixed up or reordered."""
    client = await unix.connect(echo)
    await patiently(client.call("warm"))
    values = [("x" if n % 2 else "y") * size for n, size in enumerate([10, 70_000, 1_000_000, 100, 300_000] * 12)]
    found = await patiently(asyncio.gather(*[client.call(each) for each in values]))
    assert found == values
    streams = [client.generate(each, annotated=False) for each in values]
    assert [await patiently(drained(each)) for each in streams] == [[each] for each in values]


@pytest.mark.parametrize("where", ["memory", "unix"])
async def test_requests_that_are_left_while_they_wait_to_be_sent_harm_nobody(
    where: str, cluster: Cluster, unix: Cluster
) -> None:
    client = await (cluster if where == "memory" else unix).connect(echo)
    await patiently(client.call("warm"))
    large = [asyncio.create_task(client.call("x" * 3_000_000)) for _ in range(3)]
    for n in range(40):
        await asyncio.sleep(0)
        stream = client.generate("y" * 100_000, timeout=0.001 if n % 2 else None)
        await asyncio.sleep(0)
        if n % 2 == 0:
            stream.cancel()
        small = client.generate(n, annotated=False)
        if n % 4 == 0:
            small.cancel()
    assert [len(each) for each in await patiently(asyncio.gather(*large))] == [3_000_000] * 3
    await until(lambda: not client.stats.inflight)
    assert client.stats.outcomes()["lost"] == 0
    assert client.stats.outcomes()["unreachable"] == 0


@dataclasses.dataclass
class Point:
    x: int
    y: int


class Record(msgspec.Struct):
    name: str
    points: list[Point]


async def test_objects_arrive_as_plain_values_where_no_type_is_asked_for(cluster: Cluster) -> None:
    client = await cluster.connect(echo)
    assert await patiently(client.call(Record("r", [Point(1, 2)]))) == {"name": "r", "points": [{"x": 1, "y": 2}]}


@pytest.mark.any_loop
async def test_arrays_arrive_as_arrays(unix: Cluster) -> None:
    client = await unix.connect(echo)
    large = np.arange(50_000, dtype=np.float32).reshape(50, 1000)  # test_shared_memory.py has larger ones
    small = np.arange(3, dtype=np.int16)
    found = await patiently(client.call({"large": large, "small": small, "n": 1}))
    assert found["large"].dtype == large.dtype
    assert np.array_equal(found["large"], large)
    assert np.array_equal(found["small"], small)
    found["large"][0, 0] = 7  # it is the receiver's own memory


async def test_a_bad_request_raises_in_the_call_and_names_the_path(cluster: Cluster) -> None:
    client = await cluster.connect(echo)
    for method in (client.generate, client.round_robin, client.random):
        with pytest.raises(TypeError, match=r'request\["a"\]\[0\]\.x'):
            method({"a": [Point(object(), 1)]})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="request"):
        client.direct(object(), client.instance_ids()[0])
    with pytest.raises(TypeError, match="request"):
        await client.call(object())
    assert client.stats.inflight == 0


async def test_a_request_with_too_many_buffers_leaves_nothing_behind(cluster: Cluster) -> None:
    client = await cluster.connect(echo)
    assert await patiently(client.call(0)) == 0
    session = client.pool.get(client.candidates.instances[0].addresses)
    assert session is not None
    left = session.connection._budget._left
    written = session.connection._last_opened
    for _ in range(3):
        with pytest.raises(ValueError, match="at most 32,766 large arrays and buffers, not 32,800"):
            await patiently(client.call([bytes(16 * KIB)] * 32_800))
    assert session.streams == {}
    assert session.connection._budget._left == left
    assert (
        session.connection._last_opened == written
    )  # no id was taken, so none is cancelled that the worker has not seen
    assert not len(client.load)
    assert await patiently(client.call(1)) == 1


async def test_a_bad_item_reaches_the_caller_and_names_the_path(cluster: Cluster) -> None:
    ended = asyncio.Event()

    async def handler(request: Any) -> AsyncIterator[Any]:
        try:
            yield 1
            yield {"b": [0, object()]}
        finally:
            ended.set()

    client = await cluster.connect(handler)
    found: list[Any] = []
    with pytest.raises(TypeError, match=r'item\["b"\]\[1\]'):
        await into(found, client.generate(1, annotated=False))
    assert found == [1]
    await patiently(ended.wait())


# --- the limit -------------------------------------------------------------------------------------------------------

LIMIT = 100_000


@pytest.fixture
async def limited() -> AsyncIterator[Cluster]:
    made = Cluster(max_message_bytes=LIMIT)
    yield made
    await made.close()


@pytest.mark.parametrize("kind", [str, bytes])
async def test_a_request_above_the_limit(kind: type, limited: Cluster) -> None:
    began = asyncio.Event()

    async def handler(request: Any) -> AsyncIterator[int]:
        yield 1
        began.set()
        await release.wait()
        yield 2

    release = asyncio.Event()
    client = await limited.connect(handler)
    beside = client.generate(1, annotated=False)
    reading = aiter(beside)
    await patiently(anext(reading))
    large = "x" * 2 * LIMIT if kind is str else b"x" * 2 * LIMIT
    for attempt in (lambda: drained(client.generate(large)), lambda: client.call(large)):
        with pytest.raises(MessageTooLarge, match="TRD_MAX_MESSAGE_BYTES") as caught:
            await patiently(attempt())
        assert caught.value.limit == LIMIT
        assert 2 * LIMIT <= caught.value.size < 2 * LIMIT + 200
        assert "100,000" in str(caught.value)
        assert isinstance(caught.value, ValueError)
    client.generate("small")
    await patiently(began.wait())
    release.set()
    assert [item async for item in reading] == [2]  # nobody else is harmed
    assert client.stats.outcomes()["lost"] == 0


@pytest.mark.parametrize("kind", ["str", "bytes", "array"])
async def test_an_item_above_the_limit(kind: str, limited: Cluster) -> None:
    async def handler(request: Any) -> AsyncIterator[Any]:
        yield 1
        yield {"str": "x" * 2 * LIMIT, "bytes": b"x" * 2 * LIMIT, "array": np.zeros(2 * LIMIT, np.uint8)}[kind]

    client = await limited.connect(handler)
    found: list[Any] = []
    with pytest.raises(MessageTooLarge, match="TRD_MAX_MESSAGE_BYTES"):
        await into(found, client.generate(1, annotated=False))
    assert found == [1]
    with pytest.raises(MessageTooLarge):
        await patiently(drained(client.generate(1)))


async def test_the_smaller_limit_of_the_two_ends_holds(cluster: Cluster) -> None:
    worker = cluster.runtime(max_message_bytes=LIMIT)
    await cluster.serve(worker, echo)
    client = await cluster.client()
    with pytest.raises(MessageTooLarge, match="100,000"):
        await patiently(client.call("x" * 2 * LIMIT))
    assert await patiently(client.call("small")) == "small"


async def test_the_largest_message_that_fits(limited: Cluster) -> None:
    client = await limited.connect(echo_stream)
    for size in (LIMIT - 200, LIMIT - 100):
        assert await patiently(drained(client.generate("x" * size, annotated=False))) == ["x" * size, "after"]
