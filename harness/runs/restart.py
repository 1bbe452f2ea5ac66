"""Restarts workers one after the other while clients call them steadily."""

from __future__ import annotations

from harness.fleet import WORKERS
from harness.report import Found
from harness.runs.kill import Rolling


async def restart(rolling: Rolling, rounds: int) -> Found:
    """SIGTERM each worker and start its successor at once. Wait until it is registered and the old worker has ended.

    Raises:
        ChildFailed: a worker does not end with status 0.
    """
    async with rolling as fleet:
        events = [(await fleet.restart(name))[0] for _ in range(rounds) for name in WORKERS]
        found, report = await rolling.found(events)
    calls, whole = sum(report["calls"].values()), sum(report["whole"].values())
    found.promise("no call of any kind fails", whole == calls, f"{calls - whole} of {calls:,}")
    return found
