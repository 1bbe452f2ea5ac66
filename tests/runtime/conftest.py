"""Fixtures of the runtime's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.runtime.cluster import Cluster


@pytest.fixture
async def cluster(plane: dict[str, str]) -> AsyncIterator[Cluster]:
    """Runtimes joined in memory, and over NATS."""
    made = Cluster(**plane)
    yield made
    await made.close()


@pytest.fixture
async def unix(trd_dir: Path) -> AsyncIterator[Cluster]:
    """Runtimes that find each other through files and meet on Unix sockets."""
    made = Cluster(discovery="file", directory=trd_dir)
    yield made
    await made.close()
