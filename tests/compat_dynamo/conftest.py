"""Fixtures: a runtime of the Dynamo names in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from triton_distributed.compat.dynamo import DistributedRuntime


@pytest.fixture
async def runtime() -> AsyncIterator[DistributedRuntime]:
    made = DistributedRuntime(asyncio.get_running_loop(), "mem", "tcp")
    yield made
    await made.native.close()
