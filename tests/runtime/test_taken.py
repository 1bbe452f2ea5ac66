"""A request is what the caller passed, whatever the caller does with that memory afterwards."""

from __future__ import annotations

import array
import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.runtime.cluster import Cluster, drained, patiently, until
from triton_distributed.payload import outofband
from triton_distributed.payload.codec import Message, encode
from triton_distributed.runtime import Context

SIZES = {"small": 64, "at the limit": 16 * 1024, "large": 1_000_000}


@dataclasses.dataclass
class Holder:
    data: Any


class Record(msgspec.Struct):
    data: Any


def numpy_array(size: int) -> Any:
    return np.full(size, 7, dtype=np.uint8)


def part_of_an_array(size: int) -> Any:
    return np.full((size, 2), 7, dtype=np.uint8)[:, 0]


MAKE: dict[str, Callable[[int], Any]] = {
    "ndarray": numpy_array,
    "strided": part_of_an_array,
    "bytearray": lambda size: bytearray(b"\x07" * size),
    "memoryview": lambda size: memoryview(bytearray(b"\x07" * size)),
    "array": lambda size: array.array("B", b"\x07" * size),
}

WRAP: dict[str, Callable[[Any], Any]] = {
    "bare": lambda value: value,
    "dict": lambda value: {"k": [1, value]},
    "dataclass": Holder,
    "struct": Record,
}


def change(value: Any) -> None:
    """Overwrite all of it in place."""
    if isinstance(value, np.ndarray):
        value[:] = 0
    elif isinstance(value, array.array):
        value[:] = array.array("B", bytes(len(value)))
    else:
        value[:] = bytes(len(value))


def seen(request: Any) -> Any:
    while isinstance(request, dict):
        [request] = request.values()
    if isinstance(request, list):
        request = request[-1]
    return sorted(set(bytes(request)))


async def look(request: Any) -> Any:
    return seen(request)


@pytest.mark.parametrize("how", ["generate", "round_robin", "random", "direct"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", MAKE)
async def test_what_is_changed_after_the_call_does_not_reach_the_handler(
    kind: str, size: str, how: str, unix: Cluster
) -> None:
    client = await unix.connect(look)
    value = MAKE[kind](SIZES[size])
    arguments = [client.instance_ids()[0]] if how == "direct" else []
    stream = getattr(client, how)(value, *arguments, annotated=False)
    change(value)
    assert await patiently(drained(stream)) == [[7]]


@pytest.mark.parametrize("wrap", WRAP)
async def test_nor_what_is_inside_of_a_value(wrap: str, cluster: Cluster) -> None:
    client = await cluster.connect(look)
    value = numpy_array(SIZES["large"])
    request = WRAP[wrap](value)
    stream = client.generate(request, annotated=False)
    change(value)
    assert await patiently(drained(stream)) == [[7]]


async def test_containers_may_be_changed_as_well(cluster: Cluster) -> None:
    async def echo(request: Any) -> Any:
        return request

    client = await cluster.connect(echo)
    request: dict[str, Any] = {"a": [1, 2], "b": {"c": "d"}}
    streams = []
    for n in range(3):
        request["a"].append(n)
        streams.append(client.generate(request, annotated=False))
    request.clear()
    assert [await patiently(drained(each)) for each in streams] == [
        [{"a": [1, 2, *range(n + 1)], "b": {"c": "d"}}] for n in range(3)
    ]


@pytest.mark.parametrize("options", [{"idempotent": True}, {"resume": True}], ids=str)
async def test_a_request_that_moves_to_another_worker_is_still_what_was_passed(
    options: dict[str, Any], cluster: Cluster
) -> None:
    saw: list[Any] = []

    async def handler(request: Any, context: Context) -> AsyncIterator[int]:
        saw.append(seen(request))
        if len(saw) == 1:
            await asyncio.Event().wait()
        yield 1

    workers = [await cluster.worker(handler, graceful_shutdown=False) for _ in range(2)]
    client = await cluster.client()
    await until(lambda: len(client.instance_ids()) == 2)
    value = numpy_array(SIZES["large"])
    stream = await patiently(client.generate(value, annotated=False, **options))
    await until(lambda: saw)
    change(value)
    [asked] = [each for each in workers if each.instance_id == stream.instance_id]
    reading = asyncio.ensure_future(drained(stream))
    await patiently(asked.close())
    assert await patiently(reading) == [1]
    assert saw == [[7], [7]]


async def test_a_refused_request_that_moves_is_still_what_was_passed(cluster: Cluster) -> None:
    release = asyncio.Event()
    saw: list[Any] = []

    async def handler(request: Any) -> Any:
        if isinstance(request, str):
            await release.wait()
            return request
        saw.append(seen(request))
        return "looked"

    full, free = [await cluster.worker(handler, max_inflight=1, max_queue=0) for _ in range(2)]
    client = await cluster.client(
        policy=lambda request, instances, load: min(instances, key=lambda each: each.id != full.instance_id)
    )
    await until(lambda: len(client.instance_ids()) == 2)
    first = asyncio.ensure_future(client.call("holds"))
    await until(lambda: full.stats()["t/components/c/e"].inflight)
    value = numpy_array(SIZES["large"])
    stream = client.generate(value, annotated=False)
    change(value)
    assert await patiently(drained(stream)) == ["looked"]
    assert saw == [[7]]
    assert stream.instance_id == free.instance_id
    release.set()
    await patiently(first)


def test_bytes_are_not_copied() -> None:
    """Nobody can change them: a copy would be wasted."""
    value = b"\x07" * SIZES["large"]
    message = encode({"k": value})
    assert isinstance(message, Message)
    assert message.owned().buffers[0].obj is value
    mutable = encode(bytearray(value))
    assert isinstance(mutable, Message)
    assert mutable.owned().buffers[0].obj is not mutable.buffers[0].obj


@pytest.mark.parametrize("size", [outofband.HUGE - 1, outofband.HUGE, outofband.HUGE + 4097])
def test_a_copy_of_any_size_has_its_own_memory(size: int) -> None:
    value = bytearray(bytes(range(251)) * (size // 251 + 1))[:size]
    copied = outofband.copy_of(memoryview(value))
    assert copied == value
    value[-1] ^= 1
    assert copied[-1] != value[-1]


async def test_a_call_that_moves_keeps_reading_the_callers_memory(cluster: Cluster) -> None:
    """`call` does not copy: its memory is the caller's again when it returns, and is as it was."""
    saw: list[Any] = []

    async def handler(request: Any) -> Any:
        saw.append(seen(request))
        if len(saw) == 1:
            await asyncio.Event().wait()
        return "looked"

    workers = [await cluster.worker(handler, graceful_shutdown=False) for _ in range(2)]
    client = await cluster.client()
    await until(lambda: len(client.instance_ids()) == 2)
    value = numpy_array(SIZES["large"])
    calling = asyncio.ensure_future(client.call(value, idempotent=True))
    await until(lambda: saw)
    await patiently(asyncio.gather(*[each.close() for each in workers if each.stats()["t/components/c/e"].inflight]))
    assert await patiently(calling) == "looked"
    assert saw == [[7], [7]]
    change(value)  # it can be written to: nobody holds a view that forbids it
