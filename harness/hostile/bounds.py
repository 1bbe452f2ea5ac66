"""The bounds of what an attack may cost."""

from __future__ import annotations

from typing import Any

MIB = 1 << 20
# Connections, waiting frames, Python's objects and its allocator's reserve: about 10 KiB for each of the 4,000
# connections of a crowd, and as much again.
MORE_MIB = 64
# TRD_MAX_HELD_BYTES in addition; the allocator may keep as much again.
HELD_MIB = 128
# 10,000 handlers (TRD_MAX_REQUESTS) with a task, a generator and a stream each: about 12 KiB.
RUNNING_MIB = 128
# For each of 20 connections: the output of all its streams (4 MiB), the data gathered for one write, asyncio's buffer,
# and an item of 15 KB in each handler that had begun before the kernel took no more.
MADE_MIB = 160
# For each of 500 connections one read of 256 KiB, which waits for its turn.
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
# A p99 below this shows only the timer's resolution and the machine's noise, whatever its ratio.
P99_FLOOR_MS = 5.0


def p99_ratio(row: dict[str, Any]) -> float:
    """The ratio of the attack's p99 to the mean of the quiet phases around it."""
    around = [each["p99_ms"] for each in row["quiet"]]
    return float(row["load"]["p99_ms"] / (sum(around) / len(around)))


def broken(row: dict[str, Any]) -> list[str]:
    """Describe the bounds that a row breaks."""
    faults = []
    allowed = ALLOWED_MIB.get(row["attack"], MORE_MIB) * MIB
    for name in ("rss_peak", "rss_after"):
        if row[name] - row["rss_before"] > allowed:
            more = (row[name] - row["rss_before"]) / MIB
            faults.append(f"{name} is {more:,.0f} MiB above what it was, allowed are {allowed // MIB}")
    for name in ("fds", "tasks"):
        before, after = row[name]
        if after > before + row.get("spare", 0):  # A client may still probe the worker that lied.
            faults.append(f"{after - before:,} {name} are left")
    for words, times in row["load"]["failed"].items():
        faults.append(f"failed {times:,} times: {words}")
    ratio = p99_ratio(row)
    if ratio > P99_RATIO and row["load"]["p99_ms"] > P99_FLOOR_MS:
        faults.append(f"p99 of the others is {ratio:.1f} times what it was")
    if row["log_lines"] > row["seconds"] / 10 * 3 + 3:
        faults.append(f"{row['log_lines']:,} lines were logged")
    return faults
