"""The phases of `make survival`, one event each: what is counted is held here, what is timed only there."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.fleet import PLANES
from harness.runs.kill import Rolling, kill
from harness.runs.overload import overload
from harness.runs.restart import restart
from harness.runs.rotation import rotation
from tests.timing import MS

RATE = 50.0
KILLED = pytest.mark.leaves("socket files", reason="a killed process cannot remove its own; the next worker does")
planes = pytest.mark.parametrize("plane", ["unix", "tcp"])


def settings(folder: Path, plane: str) -> dict[str, str]:
    return {"TRD_DIR": str(folder), **PLANES[plane]}


@KILLED
@planes
async def test_a_killed_worker_costs_no_call_that_may_go_on_elsewhere(plane: str, trd_dir: Path) -> None:
    found = await kill(Rolling(settings(trd_dir, plane), RATE, 300 * MS), 1 * MS, 500 * MS)
    assert not found.broken, found.words
    assert found.figures["events"] == 1
    assert all(found.figures["whole_by_kind"].values())


async def test_restarting_all_workers_one_by_one_costs_no_call(trd_dir: Path) -> None:
    found = await restart(Rolling(settings(trd_dir, "tcp"), RATE, 300 * MS), 1)
    assert not found.broken, found.words
    assert found.figures["events"] == 3


async def test_a_flood_is_answered_or_refused_and_retries_keep_to_their_budget(trd_dir: Path) -> None:
    found = await overload(settings(trd_dir, "unix"), 1.0, 0.05)
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
    found = await rotation(settings(trd_dir, plane), 1)
    assert found.figures["never"] == 0
    assert found.figures["failed"] == 0, found.words
    assert len(found.figures["first_ms"]) == found.figures["clients"]
