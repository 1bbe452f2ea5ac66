"""Real servers as fixtures. Where one cannot be had the test is skipped, loudly; in CI that is a failure."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Iterator

import pytest

from triton_distributed.testing import EtcdCluster, EtcdServer, NatsServer, ServerMissing


def missing(error: ServerMissing) -> None:
    """Skip the test, or fail it in CI, where the servers must be there."""
    if os.environ.get("CI"):
        pytest.fail(f"CI must have every server: {error}", pytrace=False)
    pytest.skip(str(error))


@pytest.fixture
async def etcd() -> AsyncIterator[EtcdServer]:
    """A fresh etcd of one member."""
    try:
        server = EtcdServer(environ=os.environ)
    except ServerMissing as error:
        missing(error)
    async with server:
        yield server


@pytest.fixture
async def etcd_cluster() -> AsyncIterator[EtcdCluster]:
    """A fresh etcd of three members."""
    try:
        cluster = EtcdCluster(environ=os.environ)
    except ServerMissing as error:
        missing(error)
    async with cluster:
        yield cluster


@pytest.fixture(scope="session")
def lasting_etcd() -> Iterator[EtcdServer]:
    """An etcd for all tests that leave it alone: each takes a prefix of its own."""
    try:
        server = EtcdServer(environ=os.environ)
    except ServerMissing as error:
        missing(error)
    asyncio.run(server.start())
    yield server
    asyncio.run(server.__aexit__())


@pytest.fixture
async def nats() -> AsyncIterator[NatsServer]:
    """A fresh NATS server with JetStream."""
    try:
        server = NatsServer(environ=os.environ)
    except ServerMissing as error:
        missing(error)
    async with server:
        yield server


@contextlib.contextmanager
def shared_nats() -> Iterator[str]:
    """The URL of a NATS server for more than one test, outside of any loop."""
    try:
        server = NatsServer(environ=os.environ)
    except ServerMissing as error:
        missing(error)
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(server.start())
        yield server.url
    finally:
        loop.close()
        server.kill()
        shutil.rmtree(server.folder)


@pytest.fixture(scope="session", params=["direct", "nats"])
def plane(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The settings of each request plane; whatever uses it, or a fixture made of it, runs on each.

    All tests on NATS share one server: no two runtimes ever listen on the same subject.
    """
    if request.param == "direct":
        yield {}
        return
    with shared_nats() as url:
        yield {"request_plane": "nats", "nats_server": url}
