"""Fixtures: a runtime of the Dynamo names in this process, on both request planes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from triton_distributed.compat.dynamo import DistributedRuntime


@pytest.fixture
async def runtime(plane: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[DistributedRuntime]:
    if "nats_server" in plane:
        monkeypatch.setenv("NATS_SERVER", plane["nats_server"])
    made = DistributedRuntime(asyncio.get_running_loop(), "mem", plane.get("request_plane", "tcp"))
    yield made
    await made.native.close()
