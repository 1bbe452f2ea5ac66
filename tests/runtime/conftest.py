"""Fixtures of the runtime's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.runtime.cluster import Cluster
from tests.servers import shared_nats


@pytest.fixture(scope="session", params=["direct", "nats"])
def plane(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The settings of each request plane; whatever uses it, or `cluster`, runs on each.

    All tests on NATS share one server: no two runtimes ever listen on the same subject.
    """
    if request.param == "direct":
        yield {}
        return
    with shared_nats() as url:
        yield {"request_plane": "nats", "nats_server": url}


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
