"""`client.wait_for_instances(count, timeout=)`."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, patiently, turns
from triton_distributed.errors import RuntimeClosed, TooFewInstances, TritonError
from triton_distributed.testing import LocalCluster, run_in_virtual_time


async def echo(request: Any) -> AsyncIterator[Any]:
    yield request


async def test_waiting_for_three(cluster: Cluster) -> None:
    client = await cluster.caller.endpoint("t.c.e").client()
    waiting = client.wait_for_instances(3, timeout=3600)
    assert asyncio.isfuture(waiting)
    for _ in range(2):
        await cluster.worker(echo)
    await turns()
    assert not waiting.done()
    await cluster.worker(echo)
    assert sorted(await patiently(waiting)) == sorted(client.instance_ids())
    assert client.wait_for_endpoints(3).done()
    assert await client.wait_for_endpoints(2) == client.instance_ids()


async def test_too_few_are_named(cluster: Cluster) -> None:
    await cluster.worker(echo)
    client = await cluster.client()
    with pytest.raises(TooFewInstances) as caught:
        await client.wait_for_instances(3, timeout=0.01)
    error, where = caught.value, cluster.caller.discovery.where
    assert isinstance(error, TimeoutError)
    assert isinstance(error, TritonError)
    assert (error.endpoint, error.where, error.wanted, error.found) == ("t/components/c/e", where, 3, 1)
    assert str(error) == (
        f'endpoint "t/components/c/e" has 1 of 3 instances after 0.01 s ({where} was asked): start more workers that '
        "serve it, or give a larger timeout="
    )
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    with pytest.raises(TooFewInstances, match="1 of 2 instances after 0 s"):
        await client.wait_for_instances(2, timeout=0)


async def test_a_wait_ends_with_its_runtime(cluster: Cluster) -> None:
    await cluster.worker(echo)
    client = await cluster.client()
    waiting = client.wait_for_instances(2)
    await turns()
    await cluster.caller.close()
    with pytest.raises(RuntimeClosed):
        await patiently(waiting)


@pytest.mark.parametrize("count", [0, -1, True, 1.5, "3", None])
async def test_an_invalid_count_is_named(count: Any, cluster: Cluster) -> None:
    client = await cluster.caller.endpoint("t.c.e").client()
    with pytest.raises(ValueError, match="count=.*must be a whole number of at least 1"):
        client.wait_for_instances(count)


async def test_an_invalid_timeout_is_named(cluster: Cluster) -> None:
    client = await cluster.caller.endpoint("t.c.e").client()
    with pytest.raises(ValueError, match="timeout='5': must be a number of seconds"):
        client.wait_for_instances(1, "5")  # type: ignore[arg-type]


@pytest.mark.parametrize(("workers", "words"), [(0, "no instance yet"), (1, "1 of 2 instances yet")])
def test_the_wait_is_logged_after_a_second(workers: int, words: str, caplog: pytest.LogCaptureFixture) -> None:
    def said() -> list[str]:
        return [each.getMessage() for each in caplog.records if "waiting for a worker" in each.getMessage()]

    async def main() -> None:
        async with LocalCluster() as local:
            for _ in range(workers):
                await local.worker("t.c.e", echo)
            client = await local.caller.endpoint("t.c.e").client()
            waiting = client.wait_for_instances(workers + 1)
            await asyncio.sleep(0.9)
            assert said() == []
            await asyncio.sleep(0.2)
            assert len(said()) == 1
            assert f'"t.c.e": {words}; waiting for a worker' in said()[0]
            await local.worker("t.c.e", echo)
            await waiting

    with caplog.at_level(logging.WARNING, logger="triton_distributed"):
        run_in_virtual_time(main())
