"""Every backend passes the same suite."""

from __future__ import annotations

import itertools
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.timing import MS, PATIENCE_S
from triton_distributed.discovery import Discovery
from triton_distributed.discovery.etcd.backend import EtcdDiscovery
from triton_distributed.discovery.file.backend import FileDiscovery
from triton_distributed.discovery.memory import MemoryDiscovery
from triton_distributed.discovery.static import StaticDiscovery, parse_static
from triton_distributed.external.etcd_endpoint import EtcdOptions
from triton_distributed.names import EndpointName
from triton_distributed.testing import DiscoveryConformance, EtcdServer, FixedDiscoveryConformance

HOUR_S = 3600.0

_numbers = itertools.count()

Pair = tuple[Discovery, Discovery]


@pytest.mark.any_loop
class TestMemory(DiscoveryConformance):
    patience_s = PATIENCE_S

    @pytest.fixture
    async def pair(self) -> AsyncIterator[Pair]:
        one, other = MemoryDiscovery(), MemoryDiscovery()
        yield one, other
        await one.close()
        await other.close()


LISTED = "a.b.c=tcp://h:1;a.b.d=tcp://h:1;a.b.c=tcp://h:2,unix:///s"


@pytest.mark.any_loop
class TestStatic(FixedDiscoveryConformance):
    name = EndpointName("a", "b", "c")
    listed = tuple(parse_static(LISTED))

    @pytest.fixture
    async def pair(self) -> AsyncIterator[Pair]:
        one, other = StaticDiscovery(LISTED), StaticDiscovery(LISTED)
        yield one, other
        await one.close()
        await other.close()


@pytest.mark.any_loop
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has inotify")
class TestFileByInotify(DiscoveryConformance):
    """No clock: what is seen, the kernel has told."""

    patience_s = PATIENCE_S

    @pytest.fixture
    async def pair(self, trd_dir: Path) -> AsyncIterator[Pair]:
        one, other = (FileDiscovery(trd_dir, poll_s=HOUR_S, check_s=HOUR_S) for _ in range(2))
        yield one, other
        await one.close()
        await other.close()


@pytest.mark.any_loop
class TestFileByPolling(DiscoveryConformance):
    """As on a system without inotify."""

    patience_s = PATIENCE_S

    @pytest.fixture
    async def pair(self, trd_dir: Path, no_inotify: None) -> AsyncIterator[Pair]:
        one, other = (FileDiscovery(trd_dir, poll_s=5 * MS, check_s=HOUR_S) for _ in range(2))
        yield one, other
        await one.close()
        await other.close()


@pytest.mark.any_loop
class TestEtcd(DiscoveryConformance):
    """Against a real one."""

    patience_s = PATIENCE_S

    @pytest.fixture
    async def pair(self, lasting_etcd: EtcdServer) -> AsyncIterator[Pair]:
        prefix = f"conformance-{next(_numbers)}"
        one, other = (EtcdDiscovery(EtcdOptions(lasting_etcd.url), prefix=prefix) for _ in range(2))
        yield one, other
        await one.close()
        await other.close()
