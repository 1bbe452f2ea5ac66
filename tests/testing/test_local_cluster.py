"""A local cluster serves, calls, closes everything, and says what was left over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from triton_distributed.errors import NoInstances
from triton_distributed.testing import LeftOver, LocalCluster, run_in_virtual_time

PATH = "t.c.e"


async def double(request: int) -> int:
    return 2 * request


async def forever(request: Any) -> AsyncIterator[Any]:
    yield request
    await asyncio.Event().wait()


async def test_workers_are_found_and_replaced() -> None:
    async with LocalCluster() as cluster:
        workers = [await cluster.worker(PATH, double) for _ in range(2)]
        client = await cluster.client(PATH)
        assert sorted(client.instance_ids()) == sorted(each.instance_id for each in workers)
        await workers[0].close()
        assert await client.call(4) == 8
        await workers[1].close()
        with pytest.raises(NoInstances):
            await client.call(4)


async def test_a_runtime_serves_several_endpoints_with_options() -> None:
    async with LocalCluster() as cluster:
        runtime = cluster.runtime()
        tasks = [await cluster.serve(runtime, f"t.c.e{number}", double, max_inflight=1) for number in range(2)]
        assert await (await cluster.client("t.c.e1", "p2c")).call(1) == 2
    assert all(task.done() for task in tasks)


async def test_settings_are_those_of_every_runtime(trd_dir: Path) -> None:
    async with LocalCluster(discovery="file", directory=trd_dir) as cluster:
        worker = await cluster.worker(PATH, double)
        assert worker.config.directory == cluster.caller.config.directory == trd_dir
        assert await (await cluster.client(PATH)).call(1) == 2


async def test_calls_under_way_end_with_the_block() -> None:
    async with LocalCluster(drain_timeout_s=0.01) as cluster:
        await cluster.worker(PATH, forever)
        stream = (await cluster.client(PATH)).generate(1, annotated=False)
        assert await stream.__anext__() == 1


async def test_an_endpoint_that_cannot_be_served_says_why() -> None:
    async with LocalCluster() as cluster:
        with pytest.raises(TypeError):
            await cluster.worker(PATH, 7)


async def test_a_task_that_is_left_fails_the_block() -> None:
    with pytest.raises(LeftOver, match=r"a task waits at .*test_local_cluster.py:\d+ in .*waits"):
        async with LocalCluster() as cluster:
            await cluster.worker(PATH, double)

            async def waits() -> None:
                await asyncio.Event().wait()

            task = asyncio.create_task(waits())
            await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])


async def test_an_error_within_the_block_is_not_hidden() -> None:
    with pytest.raises(KeyError):
        async with LocalCluster() as cluster:
            await cluster.worker(PATH, double)
            task = asyncio.create_task(asyncio.Event().wait())
            raise KeyError
    task.cancel()
    await asyncio.wait([task])


def test_it_runs_in_virtual_time() -> None:
    async def main() -> int:
        async with LocalCluster() as cluster:
            await cluster.worker(PATH, double)
            answer: int = await (await cluster.client(PATH)).call(3)
            return answer

    assert run_in_virtual_time(main()) == 6
