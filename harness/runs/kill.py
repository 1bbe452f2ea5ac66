"""Kills workers one after the other while clients call them steadily. Has the counts of both kinds of rolling runs."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from harness.fleet import CLIENTS, WORKERS, Fleet, service
from harness.journal import FileJournal
from harness.load import Kind, Load, join
from harness.member import Member
from harness.oracle import Oracle
from harness.report import Found, percentile
from harness.requests import ENDPOINT, Plan, Shape, Work

RATE = 100.0  # Calls a second of each client process.
QUIET_S = 2.0  # Seconds before the first event, which show the usual figures.
EVERY_S = 2.0  # Seconds between two kills.
TIMEOUT_S = 20.0  # The timeout of every call. A call that takes as long hangs.
IDS = 10**9  # The number of request ids of each client process.

# Calls of these kinds may continue with another worker, so they must not fail.
MOVING: dict[str, dict[str, Any]] = {
    "idempotent": {"idempotent": True},
    "hedged": {"idempotent": True, "hedge_after_s": 0.05},
    "resumed": {},
}
SHAPES = {"stream": Shape.STREAM, "resumed": Shape.CHECKPOINTED}


def kind(name: str) -> Kind:
    """Return a kind of call: 10 ms of work (15 ms for an idempotent call), or 20 items, one every 5 ms."""

    def plan(_: random.Random, request_id: int) -> Plan:
        if name in SHAPES:
            work = Work(request_id, SHAPES[name], 20, pause_s=0.005, wait_s=0.005)
        else:
            work = Work(request_id, Shape.UNARY, 1, wait_s=0.015 if name == "idempotent" else 0.01)
        return Plan(work, timeout_s=TIMEOUT_S, kind=name, **MOVING.get(name, {}))

    return Kind(name, 1.0, plan)


KINDS = [kind(name) for name in ("unary", "idempotent", "hedged", "stream", "resumed")]


async def calls(member: Member, number: str) -> None:
    """The part of a client: the steady load and its report."""
    clients = {ENDPOINT: await member.runtime.endpoint(ENDPOINT).client()}
    first = (int(number) + 1) * IDS
    oracle = Oracle(strict=True, longest_s=TIMEOUT_S, times=True)
    load = Load(clients, oracle, KINDS, random.Random(number), first)
    join(member, load, clients)

    async def report(journal: str, events: list[float], span_s: float) -> dict[str, Any]:
        ended = time.monotonic()
        await load.rest()
        begun = FileJournal.read(Path(journal))
        return summary(
            load, Counter({id: n for id, n in begun.items() if first <= id < first + IDS}), events, span_s, ended
        )

    member.questions["report"] = report


def summary(load: Load, begun: Counter[int], events: list[float], span_s: float, ended: float) -> dict[str, Any]:
    """Summarise the calls of one client process.

    Args:
        load: the load, at rest.
        begun: how often a handler began each request.
        events: the times of the kills or restarts, on the clock that all processes share.
        span_s: seconds after an event in which a gap counts as the event's.
        ended: when the last call had begun.
    """
    oracle = load.oracle
    oracle.close(begun)
    by_kind: dict[str, list[Any]] = {each: [] for each in load.outcomes}
    for ticket in oracle.tickets:
        by_kind[ticket.plan.kind].append(ticket)
    whole = {name: [t for t in tickets if t.outcome == "answered"] for name, tickets in by_kind.items()}
    took = {name: [t.ended_s - t.began_s for t in tickets] for name, tickets in whole.items()}
    at = oracle.answers_s
    return {
        "calls": {name: len(tickets) for name, tickets in by_kind.items()},
        "whole": {name: len(tickets) for name, tickets in whole.items()},
        "bad": dict(oracle.counts),
        "words": oracle.violations[:20],
        "incomplete": sum(t.outcome == "StreamIncomplete" for t in oracle.tickets),
        "took": {name: [percentile(t, 0.5), percentile(t, 0.99), max(t, default=0.0)] for name, t in took.items()},
        "pauses": {name: max((t.pause_s for t in tickets), default=0.0) for name, tickets in by_kind.items()},
        "late_p99_s": percentile(load.late_s, 0.99),
        "gaps": [longest_gap(at, moment, min(moment + span_s, ended)) for moment in events],
        "quiet_gap": longest_gap(at, at[0], min(events, default=ended)) if at else 0.0,
    }


def longest_gap(times: Sequence[float], begin: float, end: float) -> float:
    """Return the longest time without an answer that touches [begin, end], seconds.

    Args:
        times: the times of all answers, in order.
    """
    first = max(0, bisect_left(times, begin) - 1)
    last = min(len(times), bisect_left(times, end) + 1)
    found = times[first:last]
    return max((later - earlier for earlier, later in pairwise(found)), default=end - begin)


def merged(reports: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Merge the reports of all client processes into one. Each time is that of the worst process."""
    taken = list(reports)
    sums: dict[str, Counter[str]] = {"calls": Counter(), "whole": Counter(), "bad": Counter()}
    for each in taken:
        for name, counter in sums.items():
            counter.update(each[name])
    return {
        **{name: dict(counter) for name, counter in sums.items()},
        "words": [words for each in taken for words in each["words"]],
        "incomplete": sum(each["incomplete"] for each in taken),
        "took": {
            name: [max(figures) for figures in zip(*(each["took"][name] for each in taken), strict=True)]
            for name in taken[0]["took"]
        },
        "pauses": {name: max(each["pauses"][name] for each in taken) for name in taken[0]["pauses"]},
        "late_p99_s": max(each["late_p99_s"] for each in taken),
        "gaps": [max(of_event) for of_event in zip(*(each["gaps"] for each in taken), strict=True)],
        "quiet_gap": max(each["quiet_gap"] for each in taken),
    }


class Rolling:
    """Clients that call steadily while one worker after the other is killed or restarted.

    Args:
        settings: the settings of every process.
        rate: calls a second of each client process.
        quiet_s: seconds before the first event.
    """

    def __init__(self, settings: dict[str, str], rate: float = RATE, quiet_s: float = QUIET_S) -> None:
        self._settings, self._rate, self._quiet_s = settings, rate, quiet_s
        self._journal = str(Path(settings["TRD_DIR"]) / "begun")
        self._events: list[float] = []

    async def __aenter__(self) -> Fleet:
        self._service = service(self._settings, f"harness.worker:serve:{self._journal}", "harness.runs.kill:calls")
        self._fleet = await self._service.__aenter__()
        await self._fleet.ask(CLIENTS, "go", rate=self._rate)
        await asyncio.sleep(self._quiet_s)
        return self._fleet

    async def __aexit__(self, *exception: Any) -> None:
        await self._service.__aexit__(*exception)

    async def found(self, events: list[float]) -> tuple[Found, dict[str, Any]]:
        """End the load; return the figures and promises of every rolling run, and the merged report.

        Args:
            events: the times of the kills or restarts.
        """
        reports = await self._fleet.ask(CLIENTS, "report", journal=self._journal, events=events, span_s=EVERY_S)
        report = merged(reports.values())
        return figures(report, len(events)), report


def figures(report: dict[str, Any], events: int) -> Found:
    """Return the figures and promises that both rolling runs have in common."""
    calls, bad = (
        report["calls"],
        {name: report["bad"].get(name, 0) for name in ("failed", "truncated", "wrong", "began")},
    )
    late = report["bad"].get("late", 0)
    found = Found(words=report["words"])
    found.figures = {
        "events": events,
        "calls": sum(calls.values()),
        "calls_by_kind": calls,
        "whole_by_kind": report["whole"],
        "incomplete": report["incomplete"],
        **bad,
        "gap_p50_ms": statistics.median(report["gaps"]) * 1000,
        "gap_max_ms": max(report["gaps"]) * 1000,
        "gap_quiet_ms": report["quiet_gap"] * 1000,
        "pacing_late_p99_ms": report["late_p99_s"] * 1000,
    }
    for name, (median, p99, most) in report["took"].items():
        named = zip(("p50", "p99", "max"), (median, p99, most), strict=True)
        found.figures |= {f"{name}_{figure}_ms": value * 1000 for figure, value in named}
    found.figures["resumed_pause_ms"] = report["pauses"]["resumed"] * 1000
    once = sum(count for name, count in calls.items() if name not in MOVING)
    failed = bad["failed"] + late
    other = f"{failed} of {sum(calls.values()):,}"
    found.promise("a call fails only with StreamIncomplete, where its handler may have begun", not failed, other)
    found.promise("no stream ends well before its end", not bad["truncated"], str(bad["truncated"]))
    found.promise("no item is wrong, missing, repeated or out of order", not bad["wrong"], str(bad["wrong"]))
    began = f"{bad['began']} of {once:,}"
    found.promise("no handler begins twice for a call that does not allow it", not bad["began"], began)
    return found


async def kill(rolling: Rolling, seconds: float, every_s: float = EVERY_S) -> Found:
    """`kill -9` a worker every `every_s` seconds, and start another one at once.

    The next kill waits until the successor of the last worker is registered: two workers at a time would be another
    test.
    """
    async with rolling as fleet:
        events: list[float] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            name = WORKERS[len(events) % len(WORKERS)]
            events.append(await fleet.kill(name))
            await fleet.replace(name)
            await asyncio.sleep(events[-1] + every_s - time.monotonic())
        found, report = await rolling.found(events)
    lost = sum(report["calls"][name] - report["whole"][name] for name in MOVING)
    found.promise(
        f"no call of these kinds fails: {', '.join(MOVING)}",
        lost == 0,
        f"{lost} of {sum(report['calls'][name] for name in MOVING):,}",
    )
    return found
