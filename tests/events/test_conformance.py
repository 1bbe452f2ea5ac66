"""Every plane passes the same suite."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from tests.timing import PATIENCE_S
from triton_distributed.events import EventPlane
from triton_distributed.events.local import LocalEvents
from triton_distributed.events.memory import MemoryEvents
from triton_distributed.events.nats import NatsEvents
from triton_distributed.external.nats import NatsConnection
from triton_distributed.testing import EventConformance

Pair = tuple[EventPlane, EventPlane]


@pytest.mark.any_loop
class TestMemory(EventConformance):
    patience_s = PATIENCE_S

    @pytest.fixture
    async def pair(self) -> AsyncIterator[Pair]:
        one, other = MemoryEvents(), MemoryEvents()
        yield one, other
        await one.close()
        await other.close()


@pytest.mark.any_loop
class TestLocal(EventConformance):
    patience_s = PATIENCE_S
    large = 20_000_000  # far beyond what the kernel takes at once

    @pytest.fixture
    async def pair(self, planes: Callable[[], LocalEvents]) -> Pair:
        return planes(), planes()


@pytest.mark.any_loop
class TestNats(EventConformance):
    patience_s = PATIENCE_S

    @pytest.fixture
    async def pair(self, connect: Callable[[], NatsConnection]) -> AsyncIterator[Pair]:
        one, other = NatsEvents(connect()), NatsEvents(connect())
        yield one, other
        await one.close()
        await other.close()
