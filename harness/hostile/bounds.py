"""What an attack may cost."""

from __future__ import annotations

from typing import Any

MIB = 1 << 20
# Connections, frames that wait, Python's own objects and what its allocator keeps: some 10 KiB for each of the 4,000
# connections of a crowd, and as much again.
MORE_MIB = 64
# TRD_MAX_HELD_BYTES beside that, of which the allocator may keep as much again.
HELD_MIB = 128
# 10,000 handlers (TRD_MAX_REQUESTS) with a task, a generator and a stream each: some 12 KiB.
RUNNING_MIB = 128
# Of each of 20 connections: what all its streams may make (4 MiB), what was gathered for one write, what asyncio holds,
# and an item of 15 KB in each of the handlers that had begun before the kernel took no more.
MADE_MIB = 160
# Of each of 500 connections one read of 256 KiB, which waits for its turn.
READ_MIB = 125
ALLOWED_MIB = {
    "not_reading": MADE_MIB,
    "not_reading_unix": MADE_MIB,
    "never_ended": RUNNING_MIB,
    "unread_uploads": MORE_MIB + HELD_MIB,
    "batches": MORE_MIB + HELD_MIB,
    "sizes": MORE_MIB + HELD_MIB,
    "unread_pings": MORE_MIB + READ_MIB,
}
P99_RATIO = 2.0
# Below this a p99 is the timer's grain and the machine's own unrest, whatever its quotient.
P99_FLOOR_MS = 5.0


def p99_ratio(row: dict[str, Any]) -> float:
    """The attack's p99 against the mean of the quiet phases around it."""
    around = [each["p99_ms"] for each in row["quiet"]]
    return float(row["load"]["p99_ms"] / (sum(around) / len(around)))


def broken(row: dict[str, Any]) -> list[str]:
    """Which bounds a row breaks, in words."""
    faults = []
    allowed = ALLOWED_MIB.get(row["attack"], MORE_MIB) * MIB
    for name in ("rss_peak", "rss_after"):
        if row[name] - row["rss_before"] > allowed:
            more = (row[name] - row["rss_before"]) / MIB
            faults.append(f"{name} is {more:,.0f} MiB above what it was, allowed are {allowed // MIB}")
    for name in ("fds", "tasks"):
        before, after = row[name]
        if after > before + row.get("spare", 0):  # a client may still be probing the worker that lied
            faults.append(f"{after - before:,} {name} are left")
    for words, times in row["load"]["failed"].items():
        faults.append(f"failed {times:,} times: {words}")
    ratio = p99_ratio(row)
    if ratio > P99_RATIO and row["load"]["p99_ms"] > P99_FLOOR_MS:
        faults.append(f"p99 of the others is {ratio:.1f} times what it was")
    if row["log_lines"] > row["seconds"] / 10 * 3 + 3:
        faults.append(f"{row['log_lines']:,} lines were logged")
    return faults
