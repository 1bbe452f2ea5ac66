"""Fixtures of the status port's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.runtime.cluster import Cluster


@pytest.fixture
async def watched() -> AsyncIterator[Cluster]:
    """Runtimes joined in memory, each with a status port of its own."""
    made = Cluster(status_port=0)
    yield made
    await made.close()
