"""The event loops that tests run on.

A test runs on asyncio's own loop; marked `@pytest.mark.any_loop` it runs once on each. TRD_TEST_LOOP=uvloop puts every
unmarked test on uvloop's instead.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping

import pytest

try:
    import uvloop
except ImportError:  # no wheel for this platform: the package falls back to asyncio, and so do the tests
    uvloop = None  # type: ignore[assignment]

LoopFactory = Callable[[], asyncio.AbstractEventLoop]

FACTORIES: dict[str, LoopFactory] = {"asyncio": asyncio.SelectorEventLoop}
if uvloop is not None:
    FACTORIES["uvloop"] = uvloop.new_event_loop

USUAL = os.environ.get("TRD_TEST_LOOP", "asyncio")


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Mapping[str, LoopFactory]:
    if item.get_closest_marker("any_loop"):
        return FACTORIES
    return {USUAL: FACTORIES[USUAL]}


def pytest_sessionstart(session: pytest.Session) -> None:
    for factory in FACTORIES.values():  # libuv opens a pipe for the whole process with its first loop: no test leaks it
        factory().close()


def pytest_report_header(config: pytest.Config) -> str:
    return f"loops: {USUAL}; marked any_loop: {', '.join(FACTORIES)}"
