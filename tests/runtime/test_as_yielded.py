"""What arrives is what was yielded, sent or published, whatever its owner does with it right afterwards.

A table: who hands a value over × what kind of value × its size × what carries it. Each owner has one object, writes its
number into all of it, hands it over, and spoils it as soon as it goes on.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pydantic
import pytest

from tests.runtime.cluster import Cluster, patiently, turns
from tests.timing import PATIENCE_S
from triton_distributed.runtime import Annotated, Client, Context, triton_endpoint

ITEMS = 4
SPOILT = 99
KIB = 1024
# An array in the body of its message; one beside it that is sent in one frame; one that is sent from where it is. The
# last is above the window too, so that it waits for credit in its middle.
SIZES = {"small": 64, "middle": 40 * KIB, "large": 600 * KIB}


@dataclasses.dataclass
class Point:
    values: Any


class Record(msgspec.Struct):
    values: Any


class Model(pydantic.BaseModel):
    values: list[int]


class Value:
    """An object that is filled anew for each item.

    Args:
        make: returns the object, of so many elements.
        write: writes a number into all of it.
        read: what arrived → its elements.
    """

    def __init__(
        self, make: Callable[[int], Any], write: Callable[[Any, int], object], read: Callable[[Any], Any]
    ) -> None:
        self.make, self.write, self.read = make, write, read


def elements(each: Any) -> Any:
    return np.asarray(each).ravel(order="K")


def numbers(what: str, arrived: Any) -> set[int]:
    """The numbers that stand in it: one, where nothing was mixed up."""
    found = np.asarray(VALUES[what].read(arrived))
    return {int(found.min()), int(found.max())}


def fill(each: Any, number: int) -> None:
    each[:] = number


def fill_arrays(each: Any, number: int) -> None:
    """Fill the arrays that stand beside small values."""
    fill(each[1]["a"], number)
    fill(each[2], number)


def rows(size: int) -> Any:
    """A view that is not contiguous."""
    return np.zeros((size, 2), np.uint8)[:, 0]


def bytes_again(each: bytearray, number: int) -> None:
    """Of another length each time, which is possible only where nobody refers to the memory any more."""
    size = len(each)
    each.clear()
    each.extend(bytes([number]) * (size + 1))


VALUES = {
    "dict": Value(
        lambda n: {"n": [0] * n}, lambda v, x: v["n"].__setitem__(slice(None), [x] * len(v["n"])), lambda v: v["n"]
    ),
    "list": Value(lambda n: [0] * n, lambda v, x: v.__setitem__(slice(None), [x] * len(v)), list),
    "array": Value(lambda n: np.zeros(n, np.uint8), fill, elements),
    "array in Fortran's order": Value(lambda n: np.zeros((n, 2), np.uint8, "F"), fill, elements),
    "view of an array": Value(rows, fill, elements),
    "bytearray": Value(bytearray, bytes_again, elements),
    "memoryview": Value(
        lambda n: memoryview(bytearray(n)), lambda v, x: v.__setitem__(slice(None), bytes([x]) * len(v)), elements
    ),
    "array.array": Value(
        lambda n: array("B", bytes(n)), lambda v, x: v.__setitem__(slice(None), array("B", [x]) * len(v)), elements
    ),
    "arrays beside small values": Value(
        lambda n: [1, {"a": np.zeros(n, np.uint8), "b": 2}, np.zeros(4, np.uint8), "text"],
        fill_arrays,
        lambda v: np.concatenate([elements(v[1]["a"]), v[2]]),
    ),
    "dataclass": Value(
        lambda n: Point(np.zeros(n, np.uint8)), lambda v, x: fill(v.values, x), lambda v: elements(v["values"])
    ),
    "Struct": Value(
        lambda n: Record(np.zeros(n, np.uint8)), lambda v, x: fill(v.values, x), lambda v: elements(v["values"])
    ),
    "model": Value(
        lambda n: Model(values=[0] * n),
        lambda v, x: v.values.__setitem__(slice(None), [x] * len(v.values)),
        lambda v: v["values"],
    ),
    "Annotated": Value(
        lambda n: Annotated({"v": np.zeros(n, np.uint8)}, "event", ["comment"]),
        lambda v, x: fill(v.data()["v"], x),
        lambda v: elements(v["v"]),
    ),
}


OF_OBJECTS = {"dict", "list", "model"}  # which take longer, and are no other case when they are large


def yields(what: str, size: int) -> Iterator[Any]:
    value = VALUES[what]
    if what in OF_OBJECTS:
        size = max(6, size // 100)
    each = value.make(size)
    for number in range(ITEMS):
        value.write(each, number)
        yield each
        value.write(each, SPOILT)


def generator(request: Any) -> Iterator[Any]:
    yield from yields(*request)


async def async_generator(request: Any) -> AsyncIterator[Any]:
    for each in yields(*request):
        yield each


def returns_generator(request: Any) -> Any:
    return yields(*request)


def is_there(each: Any) -> bool:
    return each is not None


def returns_filter(request: Any) -> Any:
    return filter(is_there, yields(*request))


def returns_iterator(request: Any) -> Any:
    return itertools.chain(yields(*request))


def returns_async_generator(request: Any) -> Any:
    return async_generator(request)


async def returns_generator_later(request: Any) -> Any:
    return yields(*request)


def with_tokens(request: Any, context: Context) -> Iterator[Any]:
    for number, each in enumerate(yields(*request)):
        context.checkpoint(number)
        yield each


@triton_endpoint(list, Any)
def decorated(request: Any) -> Iterator[Any]:
    yield from yields(*request)


async def two_way(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for each in requests:
        yield each


KINDS = {
    each.__name__: each
    for each in (
        generator,
        async_generator,
        returns_generator,
        returns_filter,
        returns_iterator,
        returns_async_generator,
        returns_generator_later,
        with_tokens,
        decorated,
        two_way,
    )
}


def stream(client: Client, kind: str, what: str, size: int) -> Any:
    async def requests() -> AsyncIterator[Any]:
        for each in yields(what, size):
            yield each.data() if isinstance(each, Annotated) else each

    return client.generate(requests() if kind == "two_way" else [what, size], annotated=False)


async def arrive(kind: str, cluster: Cluster) -> None:
    client = await cluster.connect(KINDS[kind])
    for what, size in itertools.product(VALUES, SIZES.values()):
        found = []
        async with asyncio.timeout(PATIENCE_S):
            async for each in stream(client, kind, what, size):
                found.append(numbers(what, each))
                await turns(5)  # a handler that does not wait for a slow reader has gone on by now
        assert found == [{number} for number in range(ITEMS)], f"{what} of {size} elements"


@pytest.mark.parametrize("kind", KINDS)
async def test_items(kind: str, cluster: Cluster) -> None:
    await arrive(kind, cluster)


@pytest.mark.any_loop
@pytest.mark.parametrize("kind", KINDS)
async def test_items_over_a_unix_socket(kind: str, unix: Cluster) -> None:
    await arrive(kind, unix)


@pytest.mark.parametrize("what", VALUES)
async def test_events(what: str, unix: Cluster) -> None:
    """`publish` has encoded the event when it returns: the task that goes on with it may come later."""
    component = unix.runtime().namespace("t").component("c")
    other = unix.runtime().namespace("t").component("c")
    subscriptions = [component.subscribe("e"), other.subscribe("e")]
    await patiently(asyncio.gather(*subscriptions))
    tasks = []
    for each in yields(what, SIZES["small"]):
        payload = each.data() if isinstance(each, Annotated) else each
        tasks.append(asyncio.ensure_future(component.publish("e", payload)))
    await patiently(asyncio.gather(*tasks))
    for subscription in subscriptions:
        reading = aiter(subscription)
        for number in range(ITEMS):
            event = await patiently(anext(reading))
            assert numbers(what, event.data) == {number}
        subscription.close()


async def test_what_an_instance_publishes_about_itself(cluster: Cluster) -> None:
    metadata = {"model": ["one"]}
    worker = cluster.runtime()
    worker.endpoint("t.c.e").serve_endpoint(generator, metadata=metadata)
    metadata["model"].append("two")
    client = await cluster.client()
    assert client.candidates.instances[0].metadata == {"model": ["one"]}
