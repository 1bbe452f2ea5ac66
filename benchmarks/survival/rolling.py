"""Workers are killed, or restarted, one after the other, while clients call them steadily."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

from benchmarks.survival.content import KINDS, kind_of
from benchmarks.survival.fleet import Fleet
from benchmarks.survival.load import merged
from benchmarks.survival.promises import Found

RATE = 20.0  # calls a second of each kind and client process: 200 in all, and 1,600 items
QUIET_S = 2.0  # before the first event, for what is usual
EVERY_S = 2.0  # between two kills


async def rolling_kill(fleet: Fleet, seconds: float, rate: float = RATE, quiet_s: float = QUIET_S) -> Found:
    """`kill -9` a worker every 2 s, and start another at once.

    The next one is killed later than that where its predecessor's successor is not registered yet: two at a time would
    be another test.
    """
    await fleet.everybody("begin", rate=rate)
    await asyncio.sleep(quiet_s)
    events: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        number = len(events) % len(fleet.workers)
        events.append(await fleet.kill(number))
        await fleet.replace(number)
        await asyncio.sleep(events[-1] + EVERY_S - time.monotonic())
    report = merged(await fleet.everybody("end", events=events, span_s=EVERY_S))
    found = _figures(report, fleet, events)
    moved = [kind.name for kind in KINDS.values() if not kind.once]
    lost = sum(report["calls"].get(kind, 0) - report["whole"].get(kind, 0) for kind in moved)
    found.promise(
        f"no call of these kinds fails: {', '.join(moved)}",
        lost == 0,
        f"{lost} of {sum(report['calls'].get(kind, 0) for kind in moved):,}",
    )
    return found


async def rolling_restart(fleet: Fleet, rounds: int, rate: float = RATE, quiet_s: float = QUIET_S) -> Found:
    """SIGTERM a worker, start its successor at once, wait until that is registered and the old one has ended; next."""
    await fleet.everybody("begin", rate=rate)
    await asyncio.sleep(quiet_s)
    events: list[float] = []
    statuses: list[int] = []
    for _ in range(rounds):
        for number in range(len(fleet.workers)):
            at, status = await fleet.restart(number)
            events.append(at)
            statuses.append(status)
    report = merged(await fleet.everybody("end", events=events, span_s=EVERY_S))
    found = _figures(report, fleet, events)
    calls, whole = sum(report["calls"].values()), sum(report["whole"].values())
    found.promise("no call of any kind fails", whole == calls, f"{calls - whole} of {calls:,}")
    found.promise("every worker ends with status 0", not any(statuses), str(sorted(set(statuses))))
    return found


def _figures(report: dict[str, Any], fleet: Fleet, events: list[float]) -> Found:
    """What both have in common."""
    begun = fleet.begun()
    calls, bad, incomplete = report["calls"], report["bad"], report["incomplete"]
    found = Found(words=report["words"])
    found.figures = {
        "events": len(events),
        "calls": sum(calls.values()),
        "calls_by_kind": calls,
        "whole_by_kind": report["whole"],
        "incomplete": len(incomplete),
        "incomplete_said_may_have_begun": sum(not began for _, began in incomplete),
        "incomplete_never_begun": sum(key not in begun for key, _ in incomplete),
        **bad,
        "gap_p50_ms": statistics.median(report["gaps"]) * 1000,
        "gap_max_ms": max(report["gaps"]) * 1000,
        "gap_quiet_ms": report["quiet_gap"] * 1000,
        "pacing_late_p99_ms": report["late_p99_s"] * 1000,
    }
    for kind, (median, p99, most) in report["took"].items():
        figures = zip(("p50", "p99", "max"), (median, p99, most), strict=True)
        found.figures |= {f"{kind}_{name}_ms": value * 1000 for name, value in figures}
    found.figures["resumed_pause_ms"] = report["pauses"]["resumed"] * 1000
    once = sum(calls.get(kind.name, 0) for kind in KINDS.values() if kind.once)
    other = f"{bad['failed']} of {sum(calls.values()):,}"
    found.promise("a call fails only with StreamIncomplete, where its handler may have begun", not bad["failed"], other)
    found.promise("no stream ends well before its end", not bad["truncated"], str(bad["truncated"]))
    found.promise("no item is wrong, missing, repeated or out of order", not bad["wrong"], str(bad["wrong"]))
    twice = [key for key, times in begun.items() if times > 1 and kind_of(key) in KINDS and KINDS[kind_of(key)].once]
    found.promise("no handler begins twice for a call that does not allow it", not twice, f"{len(twice)} of {once:,}")
    found.words += [f"begun twice: {key}" for key in twice[:5]]
    return found
