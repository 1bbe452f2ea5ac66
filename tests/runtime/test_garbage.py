"""What was there before the first request can be kept from full collections."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, patiently


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()


async def echo(request: Any) -> Any:
    return request


async def test_what_is_there_is_frozen_once_with_the_first_endpoint(cluster: Cluster) -> None:
    runtime = cluster.runtime(gc_freeze=True)
    assert gc.get_freeze_count() == 0
    await cluster.serve(runtime, echo, "t.c.one")
    frozen = gc.get_freeze_count()
    assert frozen > 10_000  # what Python and the package have imported
    await cluster.serve(runtime, echo, "t.c.other")
    assert gc.get_freeze_count() <= frozen
    client = await cluster.client("t.c.one")
    assert await patiently(client.call(1)) == 1


async def test_nothing_is_frozen_unless_it_is_asked_for(cluster: Cluster) -> None:
    await cluster.worker(echo)
    assert gc.get_freeze_count() == 0
