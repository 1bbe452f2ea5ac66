"""A network of hosts for each test; where this machine can have none, the test is skipped and says why."""

from __future__ import annotations

import functools
import os
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from tests.hosts.network import Network, sweep, unable
from tests.hosts.running import Cluster, HostEtcd, HostNats
from tests.servers import missing
from triton_distributed.testing import ServerMissing

HOSTS = ("calls", "serves", "serves2", "control")
LOADS = pytest.StashKey[list[str]]()

why_not = functools.cache(unable)


@pytest.fixture
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    """Four hosts: one for clients, two for workers, one for etcd and NATS. A parameter holds other arguments of `Network`."""
    if reason := why_not():
        if os.environ.get("CI"):
            pytest.fail(f"CI must be able to build a network of hosts: {reason}", pytrace=False)
        pytest.skip(reason)
    sweep()
    made = Network(**{"names": HOSTS, **getattr(request, "param", {})})
    try:
        made.open()
        yield made
    finally:
        made.close()


@pytest.fixture
async def host_etcd(network: Network) -> AsyncIterator[HostEtcd]:
    """etcd on the host `control`."""
    try:
        server = HostEtcd(network["control"])
    except ServerMissing as error:
        missing(error)
    async with server:
        yield server


@pytest.fixture
async def host_nats(network: Network) -> AsyncIterator[HostNats]:
    """NATS on the host `control`."""
    try:
        server = HostNats(network["control"])
    except ServerMissing as error:
        missing(error)
    async with server:
        yield server


@pytest.fixture
async def cluster(network: Network) -> AsyncIterator[Cluster]:
    """What runs on the hosts; ended with the test."""
    made = Cluster(network)
    yield made
    await made.close()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a line about a load to what pytest prints at its end."""
    return request.config.stash.setdefault(LOADS, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = terminalreporter.config.stash.get(LOADS, [])
    if lines:
        terminalreporter.section("loads while something failed")
        for line in lines:
            terminalreporter.write_line(line)
