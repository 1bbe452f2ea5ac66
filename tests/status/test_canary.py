"""The canary: a real request to one's own endpoint, whose result `/health` shows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

import triton_distributed as trd
from tests.runtime.cluster import Cluster
from tests.status.web import fetch
from tests.timing import MS, PATIENCE_S
from triton_distributed.runtime import DistributedRuntime

PATH = "t/components/c/e"


async def health(runtime: DistributedRuntime, wanted: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """The first answer of `/health` in which the canary's result is the wanted one."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found: dict[str, Any] = (await fetch(f"{runtime.status_port.url}/health")).json()
            if PATH in found["canaries"] and wanted(found["canaries"][PATH]):
                return found
            await asyncio.sleep(20 * MS)


async def test_it_finds_a_handler_that_fails_and_requests_that_end_well_heal_it(trd_dir: Any) -> None:
    made = Cluster(status_port=0, canary_s=0.2, discovery="file", directory=trd_dir)
    requests: list[tuple[Any, Any]] = []
    works = True

    async def handler(request: Any, context: trd.Context) -> AsyncIterator[Any]:
        requests.append((request, context.metadata.get("canary")))
        if not works and context.metadata.get("canary"):
            raise OSError("the device is gone")
        yield request

    worker = await made.worker(handler, canary={"prompt": "?"})
    good = await health(worker, lambda canary: canary["ok"])
    assert good["healthy"] is True
    assert requests == [({"prompt": "?"}, True)] * len(requests) != []
    assert worker.statistics().sessions, "it goes over a real connection"
    assert worker.statistics().calls == ()

    works = False
    bad = await health(worker, lambda canary: canary["ok"] is False)
    assert bad["healthy"] is False
    assert "the device is gone" in bad["canaries"][PATH]["reason"]
    assert bad["reasons"][0].startswith(f"canary of {PATH}: ")
    assert bad["ready"] is True

    client = await made.client()
    assert await client.call(1) == 1
    assert (await health(worker, lambda canary: canary["ok"]))["healthy"] is True
    await made.close()


async def test_a_worker_at_capacity_fails_only_if_no_request_ends() -> None:
    made = Cluster(status_port=0, canary_s=0.3)
    began, go_on = asyncio.Event(), asyncio.Event()

    async def held(request: Any) -> Any:
        if request == "hold":
            began.set()
            await go_on.wait()
        return request

    worker = await made.worker(held, canary=None, max_inflight=1)
    client = await made.client()
    call = asyncio.ensure_future(client.call("hold"))
    await began.wait()  # Before the first canary, which is refused.
    bad = await health(worker, lambda canary: canary["ok"] is False)
    assert bad["canaries"][PATH]["reason"].startswith("Overloaded: ")
    go_on.set()
    assert await call == "hold"
    assert (await health(worker, lambda canary: canary["ok"]))["healthy"] is True
    await made.close()


async def test_one_that_cannot_be_sent_is_refused_when_the_endpoint_is_served(watched: Cluster) -> None:
    async def two_way(requests: AsyncIterator[int]) -> AsyncIterator[int]:
        async for each in requests:
            yield each

    with pytest.raises(TypeError, match="canary"):
        watched.runtime().endpoint("t.c.e").serve_endpoint(two_way, canary=1)
    with pytest.raises(TypeError, match="canary"):
        watched.runtime().endpoint("t.c.e").serve_endpoint(lambda request: request, canary=object())
