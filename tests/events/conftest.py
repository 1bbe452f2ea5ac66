"""Planes of one test, and processes that use them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cluster import Cluster
from triton_distributed.events.local import LocalEvents
from triton_distributed.external.nats import NatsConnection, NatsOptions
from triton_distributed.testing import NatsServer

MIB = 1024 * 1024
HOUR_S = 3600.0


def local(folder: Path, id: int, max_message_bytes: int = 64 * MIB, check_s: float = HOUR_S) -> LocalEvents:
    """A local plane as a runtime makes it."""
    return LocalEvents(folder, id=id, max_message_bytes=max_message_bytes, check_s=check_s)


@pytest.fixture
async def planes(trd_dir: Path) -> AsyncIterator[Callable[..., LocalEvents]]:
    """Makes local planes of one folder, numbered from 1; closes them."""
    made: list[LocalEvents] = []

    def make(**options: Any) -> LocalEvents:
        made.append(local(trd_dir, len(made) + 1, **options))
        return made[-1]

    yield make
    for each in made:
        await each.close()


@pytest.fixture
async def connect(nats: NatsServer) -> AsyncIterator[Callable[[], NatsConnection]]:
    """Makes connections to the test's NATS server; closes them."""
    made: list[NatsConnection] = []

    def make() -> NatsConnection:
        made.append(NatsConnection(NatsOptions(nats.url)))
        return made[-1]

    yield make
    for each in made:
        await each.close()


@pytest.fixture
async def unix(trd_dir: Path) -> AsyncIterator[Cluster]:
    """Runtimes whose events travel between processes, in the test's folder."""
    made = Cluster(discovery="file", directory=trd_dir)
    yield made
    await made.close()
