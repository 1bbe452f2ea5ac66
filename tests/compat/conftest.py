"""Fixtures of the compatibility tests: programs find the same behaviour wherever instances are registered."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cluster import Cluster
from tests.runtime.conftest import unix
from tests.servers import shared_nats
from triton_distributed.testing import EtcdServer

__all__ = ["cluster", "unix"]

_prefixes = itertools.count()


@pytest.fixture(params=["memory", "file", "etcd", "memory, NATS"])
def settings(request: pytest.FixtureRequest, lasting_etcd: EtcdServer, nats_url: str, trd_dir: Path) -> dict[str, Any]:
    """Of runtimes joined by each discovery, on direct connections; in memory also over NATS."""
    if request.param == "etcd":
        prefix = f"compat-{os.getpid()}-{next(_prefixes)}"
        return {"discovery": "etcd", "directory": trd_dir, "etcd_endpoints": lasting_etcd.url, "etcd_prefix": prefix}
    if request.param == "memory, NATS":
        return {"request_plane": "nats", "nats_server": nats_url}
    return {"discovery": request.param, "directory": trd_dir}


@pytest.fixture(scope="session")
def nats_url() -> Iterator[str]:
    """A NATS server for all of them."""
    with shared_nats() as url:
        yield url


@pytest.fixture
async def cluster(settings: dict[str, Any]) -> AsyncIterator[Cluster]:
    """Runtimes that find each other."""
    made = Cluster(**settings)
    yield made
    await made.close()
