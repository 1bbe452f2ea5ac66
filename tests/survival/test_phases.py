"""The phases of `make survival`, one event each: what is counted is held here, what is timed only there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from benchmarks.survival.__main__ import PLANES
from benchmarks.survival.fleet import Fleet
from benchmarks.survival.overload import LIMITS, overload
from benchmarks.survival.rolling import rolling_kill, rolling_restart
from benchmarks.survival.rotation import rotation
from tests.timing import MS

RATE = 10.0
KILLED = pytest.mark.leaves("socket files", reason="a killed process cannot remove its own; the next worker does")
planes = pytest.mark.parametrize("plane", ["unix", "tcp"])


@asynccontextmanager
async def fleet(folder: Path, plane: str) -> AsyncIterator[Fleet]:
    async with Fleet(folder, PLANES[plane], LIMITS) as made:
        yield made


@KILLED
@planes
async def test_a_killed_worker_costs_no_call_that_may_go_on_elsewhere(plane: str, trd_dir: Path) -> None:
    async with fleet(trd_dir, plane) as made:
        found = await rolling_kill(made, 1 * MS, RATE, 300 * MS)
    assert not found.broken, found.words
    assert found.figures["events"] == 1
    assert all(found.figures["whole_by_kind"].values())


@planes
async def test_restarting_all_workers_one_by_one_costs_no_call(plane: str, trd_dir: Path) -> None:
    async with fleet(trd_dir, plane) as made:
        found = await rolling_restart(made, 1, RATE, 300 * MS)
    assert not found.broken, found.words
    assert found.figures["events"] == 3


async def test_a_flood_is_answered_or_refused_and_retries_keep_to_their_budget(trd_dir: Path) -> None:
    async with fleet(trd_dir, "unix") as made:
        found = await overload(made, 1.5, 0.1)
    kept = {text: kept for text, kept, _ in found.promises}
    assert kept["calls are answered, refused, or out of time, and nothing else"], found.words
    assert kept["what is sent again stays within the budget"]
    figures = found.figures
    assert figures["twice_refused"]
    assert figures["twice_hints"] == figures["twice_refused"]
    assert figures["twice_admitted"] > figures["twice_expired"]


@KILLED
@planes
async def test_every_client_stops_calling_a_dead_worker(plane: str, trd_dir: Path) -> None:
    async with fleet(trd_dir, plane) as made:
        found = await rotation(made, 1)
    assert found.figures["never"] == 0
    assert found.figures["failed"] == 0, found.words
    assert len(found.figures["first_ms"]) == found.figures["clients"]
