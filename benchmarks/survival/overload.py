"""Twice, then ten times the calls that the workers have room for."""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks.survival.content import LIMITED
from benchmarks.survival.fleet import Fleet
from benchmarks.survival.promises import Found
from triton_distributed.names import EndpointName
from triton_distributed.routing import budget

SERVICE_S, MAX_INFLIGHT, MAX_QUEUE = 0.02, 8, 64
LIMITS = (SERVICE_S, MAX_INFLIGHT, MAX_QUEUE)
BUSY_LIMITS = (0.005, 1, 16)  # handlers that compute: one at a time is all that a process has
TIMEOUT_S = 0.1
CALM = 0.5  # of the capacity: before the flood, and behind it
GOOD = 0.9  # of the capacity is promised
SATURATE_S, CALM_S, HIGH_S = 4.0, 3.0, 4.0
HIGH = 10


async def _sent(fleet: Fleet) -> int:
    """Requests that have reached the workers."""
    path = EndpointName.parse(LIMITED).path
    counts = await asyncio.gather(*(each.ask("counts") for each in fleet.workers))
    return sum(sum(each[path].values()) for each in counts)


def _sum(phases: list[dict[str, Any]]) -> dict[str, Any]:
    """One phase's reports of all client processes; of times, the worst process's."""
    counted = ("calls", "good", "admitted", "expired", "refused", "failed", "tried", "hints")
    return {
        **{name: sum(each[name] for each in phases) for name in counted},
        **{name: max(each[name] for each in phases) for name in ("hint_p50_s", "p50_s", "p99_s", "late_p99_s")},
        "words": [words for each in phases for words in each["words"]],
        "windows": [each["windows"] for each in phases],
    }


async def _flood(fleet: Fleet, phases: list[tuple[float, float]], busy: bool) -> tuple[list[dict[str, Any]], int]:
    """Each phase's report, and how many requests were sent in all."""
    before = await _sent(fleet)
    rates = [(rate / len(fleet.clients), seconds) for rate, seconds in phases]
    reports = await fleet.everybody("flood", phases=rates, timeout_s=TIMEOUT_S, busy=busy)
    return [_sum(list(of_phase)) for of_phase in zip(*reports, strict=True)], await _sent(fleet) - before


async def _capacity(fleet: Fleet, seconds: float, busy: bool, callers: int) -> float:
    """Answers a second that callers get who wait for each before they call again."""
    each = callers // len(fleet.clients)
    return sum(await fleet.everybody("saturate", callers=each, seconds=seconds, busy=busy))


async def overload(fleet: Fleet, seconds: float, scale: float = 1.0) -> Found:
    """Twice the capacity, then ten times, then half of it again.

    Args:
        seconds: of twice the capacity.
        scale: of all other times.
    """
    computed = len(fleet.workers) * MAX_INFLIGHT / SERVICE_S
    measured = await _capacity(fleet, SATURATE_S * scale, False, 4 * len(fleet.workers) * MAX_INFLIGHT)
    (twice,), sent = await _flood(fleet, [(2 * computed, seconds)], False)
    calm_s = CALM_S * scale
    (calm, high, after), _ = await _flood(
        fleet, [(CALM * computed, calm_s), (HIGH * computed, HIGH_S * scale), (CALM * computed, calm_s)], False
    )
    goodput = twice["good"] / seconds
    recovered = _recovery_s(calm, after)
    retries = sent - twice["calls"]
    allowed = budget.RATIO * twice["calls"] + len(fleet.clients) * (budget.LEAST + budget.PER_SECOND * seconds)
    found = Found(words=[*twice["words"], *high["words"], *after["words"]])
    found.figures = {
        "capacity_computed_per_s": computed,
        "capacity_measured_per_s": measured,
        "offered_per_s": twice["calls"] / seconds,
        "goodput_per_s": goodput,
        "goodput_of_computed": goodput / computed,
        "goodput_of_measured": goodput / measured,
        **{f"twice_{name}": twice[name] for name in ("calls", "admitted", "expired", "refused", "failed", "hints")},
        "expired_share": twice["expired"] / max(1, twice["admitted"]),
        "timeout_ms": TIMEOUT_S * 1000,
        "p50_ms": twice["p50_s"] * 1000,
        "p99_ms": twice["p99_s"] * 1000,
        "hint_p50_ms": twice["hint_p50_s"] * 1000,
        "retries": retries,
        "retries_allowed": allowed,
        "pacing_late_p99_ms": twice["late_p99_s"] * 1000,
        "high_offered_per_s": high["calls"] / (HIGH_S * scale),
        "high_goodput_of_computed": high["good"] / (HIGH_S * scale) / computed,
        "high_expired_share": high["expired"] / max(1, high["admitted"]),
        "high_pacing_late_p99_ms": high["late_p99_s"] * 1000,
        "calm_p50_ms": calm["p50_s"] * 1000,
        "recovery_ms": None if recovered is None else recovered * 1000,
    }
    failed = twice["failed"] + high["failed"] + after["failed"]
    found.promise("calls are answered, refused, or out of time, and nothing else", not failed, f"{failed} others")
    capacity = min(computed, measured)
    found.promise(
        f"at twice the capacity, answers in time are at least {GOOD:.0%} of it",
        goodput >= GOOD * capacity,
        f"{goodput / capacity:.1%}",
    )
    late = twice["expired"] / max(1, twice["admitted"])
    found.promise("99 % of what is let in is answered in time", late <= 0.01, f"{late:.2%} late")
    found.promise("what is sent again stays within the budget", retries <= allowed, f"{retries:,} of {allowed:,.0f}")
    found.promise(
        "when the load falls, times are the usual ones again",
        recovered is not None,
        "never" if recovered is None else f"after {recovered * 1000:.0f} ms",
    )
    return found


async def busy_overload(fleet: Fleet, seconds: float, scale: float = 1.0) -> dict[str, float]:
    """Twice the capacity of handlers that compute; clients and workers share the processors, so it has no promise."""
    measured = await _capacity(fleet, SATURATE_S * scale, True, 4 * len(fleet.workers))
    (twice,), _ = await _flood(fleet, [(2 * measured, seconds)], True)
    return {
        "busy_capacity_per_s": measured,
        "busy_goodput_of_measured": twice["good"] / seconds / measured,
        "busy_expired_share": twice["expired"] / max(1, twice["admitted"]),
        "busy_refused": twice["refused"],
    }


def _recovery_s(calm: dict[str, Any], after: dict[str, Any]) -> float | None:
    """From the load's fall until nothing fails and times are the usual ones, for two windows in a row, seconds."""
    usual = 1.5 * calm["p50_s"]
    longest = 0.0
    for windows in after["windows"]:
        begin = windows[0][0]
        good = [not unanswered and median <= usual for _, _, unanswered, median in windows]
        first = next((n for n in range(len(good) - 1) if good[n] and good[n + 1]), None)
        if first is None:
            return None
        longest = max(longest, windows[first][0] - begin)
    return longest
