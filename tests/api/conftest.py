"""Fixtures of the tests of calls without an event loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import triton_distributed as trd
from tests.api.other_thread import OtherThread


@pytest.fixture
def worker(trd_dir: Path) -> Iterator[OtherThread]:
    """A worker in another thread of this process."""
    other = OtherThread(drain_timeout_s=0.0)
    yield other
    other.close()


@pytest.fixture
def sync(worker: OtherThread) -> Iterator[trd.SyncConnection]:
    """A synchronous connection, to call the worker."""
    with trd.connect_sync() as here:
        yield here
