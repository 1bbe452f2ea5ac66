"""A steady load whose every answer is checked: paced calls of all kinds, none of which waits for another."""

from __future__ import annotations

import asyncio
import random
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.survival.content import KINDS, Kind, wrong
from triton_distributed.errors import StreamIncomplete
from triton_distributed.runtime import Client

TIMEOUT_S = 20.0  # of every call: whatever takes so long hangs
MOST_WORDS = 20  # descriptions of failures that are kept; all are counted


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of them is, the nearest above; 0 of none."""
    if not values:
        return 0.0
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


class Load:
    """The calls of one client process.

    Args:
        name: begins the keys of its requests.
        rate: calls a second of each kind.
    """

    def __init__(self, client: Client, name: str, rate: float) -> None:
        self._client, self._name, self._rate = client, name, rate
        self._calls: Counter[str] = Counter()
        self._whole: Counter[str] = Counter()
        self._bad: Counter[str] = Counter()  # truncated, wrong, failed
        self._words: list[str] = []
        self._incomplete: list[tuple[str, bool]] = []  # key, and whether the error says that the handler had begun
        self._took: dict[str, list[float]] = {name: [] for name in KINDS}
        self._pauses: dict[str, float] = dict.fromkeys(KINDS, 0.0)  # the longest between two items of a stream
        self._at: list[float] = []  # of every answer and item, on the clock that all processes share
        self._late: list[float] = []
        self._stopped = False
        self._running: set[asyncio.Task[None]] = set()  # at most what is begun in TIMEOUT_S
        self._pacing = [asyncio.ensure_future(self._pace(kind, n)) for n, kind in enumerate(KINDS.values())]

    async def _pace(self, kind: Kind, place: int) -> None:
        begin, number, rng = time.monotonic(), 0, random.Random(f"{self._name} {place}")
        while not self._stopped:
            due = begin + (number + rng.random()) / self._rate  # or kills would hit every call at the same place
            await asyncio.sleep(due - time.monotonic())
            self._late.append(time.monotonic() - due)
            task = asyncio.ensure_future(self._one(kind, f"{self._name}-{kind.name}-{number}"))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            number += 1

    async def _one(self, kind: Kind, key: str) -> None:
        self._calls[kind.name] += 1
        begin, got = time.monotonic(), list[Any]()
        failure: Exception | None = None
        try:
            if kind.unary:
                got.append(await self._client.call(kind.request(key), timeout=TIMEOUT_S, **kind.options))
                self._at.append(time.monotonic())
            else:
                await self._read(kind, key, got)
        except Exception as error:
            failure = error
        self._judge(kind, key, got, failure)
        if failure is None:
            self._took[kind.name].append(time.monotonic() - begin)

    async def _read(self, kind: Kind, key: str, got: list[Any]) -> None:
        stream = self._client.generate(kind.request(key), annotated=False, timeout=TIMEOUT_S, **kind.options)
        last = 0.0
        async for each in stream:
            got.append(each)
            now = time.monotonic()
            self._at.append(now)
            if last:
                self._pauses[kind.name] = max(self._pauses[kind.name], now - last)
            last = now

    def _judge(self, kind: Kind, key: str, got: list[Any], failure: Exception | None) -> None:
        words = wrong(key, got)
        if words or len(got) > kind.items:
            self._note("wrong", words or f"{key}: {len(got)} items where {kind.items} belong")
        elif failure is None and len(got) == kind.items:
            self._whole[kind.name] += 1
        elif failure is None:
            self._note("truncated", f"{key} ended well after {len(got)} of {kind.items} items")
        elif isinstance(failure, StreamIncomplete) and kind.once:
            self._incomplete.append((key, failure.began))
            if failure.items != len(got):
                self._note("wrong", f"{key}: {len(got)} items are here, the error counts {failure.items}")
        else:
            self._note("failed", f"{key}: {type(failure).__name__}: {failure}")

    def _note(self, what: str, words: str) -> None:
        self._bad[what] += 1
        if len(self._words) < MOST_WORDS:
            self._words.append(f"{what}: {words}")

    async def end(self, events: list[float], span_s: float) -> dict[str, Any]:
        """Stop pacing, wait for what runs, and report.

        Args:
            events: when something was done to a worker, on the clock that all processes share.
            span_s: seconds behind an event in which a gap counts as its own.
        """
        self._stopped = True
        await asyncio.gather(*self._pacing)
        ended = time.monotonic()
        if self._running:
            await asyncio.wait(self._running)
        return {
            "calls": dict(self._calls),
            "whole": dict(self._whole),
            "bad": {what: self._bad[what] for what in ("failed", "truncated", "wrong")},
            "words": self._words,
            "incomplete": self._incomplete,
            "took": {
                kind: [percentile(took, 0.5), percentile(took, 0.99), max(took, default=0.0)]
                for kind, took in self._took.items()
            },
            "pauses": self._pauses,
            "late_p99_s": percentile(self._late, 0.99),
            "gaps": [longest_gap(self._at, at, min(at + span_s, ended)) for at in events],
            "quiet_gap": longest_gap(self._at, self._at[0], min(events, default=ended)) if self._at else 0.0,
        }


def longest_gap(times: Sequence[float], begin: float, end: float) -> float:
    """The longest time without an answer that touches [begin, end], seconds.

    Args:
        times: of all answers, in order.
    """
    first = max(0, bisect_left(times, begin) - 1)
    last = min(len(times), bisect_left(times, end) + 1)
    found = times[first:last]
    return max((later - earlier for earlier, later in pairwise(found)), default=end - begin)


def merged(reports: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The reports of all client processes as one; of times, each the worst process's."""
    taken = list(reports)
    sums: dict[str, Counter[str]] = {"calls": Counter(), "whole": Counter(), "bad": Counter()}
    for each in taken:
        for name, counter in sums.items():
            counter.update(each[name])
    return {
        **{name: dict(counter) for name, counter in sums.items()},
        "words": [words for each in taken for words in each["words"]],
        "incomplete": [entry for each in taken for entry in each["incomplete"]],
        "took": {
            kind: [max(of_figure) for of_figure in zip(*(each["took"][kind] for each in taken), strict=True)]
            for kind in KINDS
        },
        "pauses": {kind: max(each["pauses"][kind] for each in taken) for kind in KINDS},
        "late_p99_s": max(each["late_p99_s"] for each in taken),
        "gaps": [max(of_event) for of_event in zip(*(each["gaps"] for each in taken), strict=True)],
        "quiet_gap": max(each["quiet_gap"] for each in taken),
    }
