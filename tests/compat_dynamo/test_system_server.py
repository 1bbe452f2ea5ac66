"""Dynamo's system server is the status port: its variables, engine routes, health and canary."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.status.web import fetch
from tests.timing import MS, PATIENCE_S
from triton_distributed.compat.dynamo import DistributedRuntime
from triton_distributed.errors import ConfigError


async def test_routes_health_and_canary(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"DYN_SYSTEM_PORT": "0", "DYN_HEALTH_CHECK_ENABLED": "true", "DYN_CANARY_WAIT_TIME": "0.2"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    requests: list[Any] = []
    bodies: list[Any] = []

    async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
        requests.append(request)
        yield {"token": 1}

    async def pause(body: dict[str, Any]) -> dict[str, Any]:
        bodies.append(body)
        return {"status": "ok"}

    async def never(body: dict[str, Any]) -> dict[str, Any]:
        raise AssertionError("a later callback replaces the former one")

    runtime = DistributedRuntime(asyncio.get_running_loop(), "mem")
    url = runtime.system_status_server_url()
    assert url is not None
    runtime.register_engine_route("pause", never)
    runtime.register_engine_route("pause", pause)
    runtime.register_engine_route("update/lora", pause)
    with pytest.raises(ValueError, match="route"):
        runtime.register_engine_route("not a path", pause)
    endpoint = runtime.endpoint("d.back.generate")
    serving = asyncio.ensure_future(endpoint.serve_endpoint(generate, health_check_payload={"prompt": "x"}))
    async with asyncio.timeout(PATIENCE_S):
        while not requests:
            await asyncio.sleep(10 * MS)
        while not (health := (await fetch(f"{url}/health")).json())["healthy"]:
            await asyncio.sleep(10 * MS)
    assert requests[0] == {"prompt": "x"}
    assert list(health["canaries"]) == ["d/components/back/generate"]

    assert (await fetch(f"{url}/engine/pause", "POST")).json() == {"status": "ok"}
    assert (await fetch(f"{url}/engine/update/lora", "POST", b'{"name": "a"}')).status == 200
    assert bodies == [{}, {"name": "a"}]

    for ready, status in ((False, 503), (True, 200)):
        runtime.set_health_status(ready)
        assert (await fetch(f"{url}/health")).status == status
        assert (await fetch(f"{url}/live")).status == 200
    runtime.shutdown()
    await serving
    await runtime.native.close()
    assert runtime.system_status_server_url() is None


async def test_without_the_variables_there_is_no_server(
    runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runtime.system_status_server_url() is None
    runtime.set_health_status(False)

    async def generate(request: Any) -> AsyncIterator[Any]:
        yield request

    serving = asyncio.ensure_future(
        runtime.endpoint("d.back.e").serve_endpoint(generate, health_check_payload={"a": 1})
    )
    client = await runtime.endpoint("d.back.e").client()
    await client.wait_for_instances()
    serving.cancel()
    monkeypatch.setenv("DYN_SYSTEM_PORT", "x")
    with pytest.raises(Exception, match="DYN_SYSTEM_PORT") as failed:
        DistributedRuntime(asyncio.get_running_loop(), "mem")
    assert isinstance(failed.value.__cause__, ConfigError)
