"""One soak from its beginning to its verdict."""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from benchmarks.machine import describe
from benchmarks.processes import BenchmarkError
from benchmarks.soak import judging
from benchmarks.soak.stage import CLIENTS, RESTARTED, WORKERS, Options, Stage, faults, make, staged

FAULT_S = 5.0  # every other one is a restart
QUIET_S = 60.0
SAMPLE_S = 3.0
LOOK_S = 0.25  # between two looks whether everything has come to rest
LASTING = [name for name in (*WORKERS, *CLIENTS) if name != RESTARTED]


class Run:
    """A soak under way.

    Args:
        say: takes a line of progress.

    Attributes:
        histories: of each process, `samples` under load, `quiet` moments, and what has grown between those.
        wrong: what must not happen, in words.
    """

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self.options, self._say = options, say
        self.histories: dict[str, dict[str, Any]] = {
            name: {"samples": [], "quiet": [], "growths": {"types": {}, "kept": {}, "traced": []}}
            for name in (*WORKERS, *CLIENTS)
        }
        self.wrong: list[str] = []
        self.outcomes: dict[str, Counter[str]] = {}
        self.said: Counter[str] = Counter()
        self._began = 0.0  # later by every rest
        self._rests_since: float | None = None
        self._loaded = asyncio.Event()
        self._least: dict[str, tuple[int, ...]] | None = None  # of what is counted, after the warm-up

    @property
    def _at(self) -> float:
        """Seconds of load so far."""
        return (self._rests_since or time.monotonic()) - self._began

    async def go(self, stage: Stage) -> None:
        """The whole load; stops at the first quiet moment at which something is wrong."""
        seconds = self.options.seconds
        fault_s, quiet_s = min(FAULT_S, seconds / 10), min(QUIET_S, seconds / 5)
        self._began = time.monotonic()
        await self._settle(stage)
        sampling = asyncio.create_task(self._sample(stage))
        making, made = faults(random.Random(self.options.seed)), 0
        try:
            await self._load(stage)
            rests = 1
            while True:  # on a slow machine all comes later, and in the same order
                next_fault, next_quiet = (made + 1) * fault_s, min(rests * quiet_s, seconds)
                await asyncio.sleep(max(0.0, min(next_fault, next_quiet) - self._at))
                if sampling.done():
                    sampling.result()
                if next_quiet > next_fault:
                    await make(stage, making[made % len(making)])
                    made += 1
                    continue
                if not await self._quiet(stage, next_quiet / seconds) or next_quiet >= seconds:
                    break
                rests += 1
                await self._load(stage)
        finally:
            sampling.cancel()
            await asyncio.wait({sampling})
        for name, growths in (await stage.everybody("growths")).items():
            self.histories[name]["growths"] = growths

    async def _load(self, stage: Stage) -> None:
        await stage.everybody("go")
        assert self._rests_since is not None
        self._began += time.monotonic() - self._rests_since
        self._rests_since = None
        self._loaded.set()

    async def _sample(self, stage: Stage) -> None:
        while True:
            await self._loaded.wait()
            for each in stage.processes:
                sample = await each.ask("sample")
                if self._loaded.is_set():
                    self.histories[each.name]["samples"].append({"at": round(self._at, 1), **sample})
            await asyncio.sleep(min(SAMPLE_S, self.options.seconds / 50))

    async def _settle(self, stage: Stage) -> dict[str, Any]:
        """Have nothing go on; returns how everybody is then."""
        self._loaded.clear()
        self._rests_since = time.monotonic()
        for group in (stage.clients, stage.workers):  # first those whose calls keep the others busy
            await asyncio.gather(*(each.ask("rest") for each in group.values()))
        await stage.everybody("touch", ids=stage.instances)
        end, before = time.monotonic() + self.options.settle_s, None
        while True:
            looks = await stage.everybody("quiet")
            now = _counted(looks)
            settled = now == before and self._no_more(now) and not judging.events(_news(looks))
            if settled or time.monotonic() > end:
                return looks
            before = now
            await asyncio.sleep(LOOK_S)

    def _no_more(self, now: dict[str, tuple[int, ...]]) -> bool:
        """Whether there is no more of anything than at the quiet moments so far."""
        least = self._least
        return least is None or all(a <= b for name in LASTING for a, b in zip(now[name], least[name], strict=True))

    async def _quiet(self, stage: Stage, part: float) -> bool:
        """Look at a quiet moment; returns whether all is well and nobody has more than before.

        Args:
            part: of the run that is over by then.
        """
        looks = await self._settle(stage)
        at = part * self.options.seconds
        self.wrong += judging.events(_news(looks))
        for name, look in looks.items():
            figures = {what: value for what, value in look.items() if what != "news"}
            self.histories[name]["quiet"].append({"at": round(at, 1), **figures})
        now, least = _counted(looks), self._least
        well = self._no_more(now)
        if part >= judging.WARM_UP:
            if least is None or part <= judging.HALF_WAY:
                await stage.everybody("baseline")
            least = least or now
            self._least = {name: tuple(map(min, now[name], least[name])) for name in LASTING}
        await self._tell(stage)
        words = (f"{name} {look['rss'] / 2**20:.1f} MiB {look['descriptors']} fds" for name, look in looks.items())
        self._say(f"{at:5.0f} s: {', '.join(words)}; {sum(map(Counter.total, self.outcomes.values())):,} calls")
        return well and not self.wrong

    async def _tell(self, stage: Stage) -> None:
        """Take in what the clients have counted, and what anybody has logged."""
        tallies = [await each.ask("tally") for each in stage.clients.values()]
        self.outcomes = {kind: Counter() for kind in tallies[0]["outcomes"]}
        lost: Counter[int] = Counter()
        for tally in tallies:
            for kind, counts in tally["outcomes"].items():
                self.outcomes[kind].update(counts)
            lost.update({int(instance): count for instance, count in tally["lost"].items()})
        said = [*stage.said, *(await stage.everybody("said")).values()]
        found = [
            *(each for tally in tallies for each in tally["failures"]),
            *judging.lost(lost, stage.broken),
            *(f"logged: {fault}" for each in said for fault in each["faults"]),
        ]
        self.wrong += [each for each in found if each not in self.wrong]
        self.said = sum((Counter(each["counts"]) for each in said), Counter[str]())


def _counted(looks: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(looks[name][what] for what in judging.COUNTED) for name in LASTING}


def _news(looks: dict[str, Any]) -> dict[str, Any]:
    return {name: look["news"] for name, look in looks.items()}


def compact(history: dict[str, Any]) -> dict[str, Any]:
    """A history with a list for each figure of its samples, in place of a dict for each sample."""
    samples = history["samples"]
    return {**history, "samples": {what: [each[what] for each in samples] for what in samples[0]} if samples else {}}


async def soak(options: Options, command: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Run a soak; returns its result, in which `wrong` is empty where all is well.

    Args:
        command: that repeats it.
        say: takes a line of progress.
    """
    run, load = Run(options, say), os.getloadavg()[0]
    begin = time.monotonic()
    done: Counter[str] = Counter()
    drains_s: list[float] = []
    try:
        async with staged(options) as stage:
            done, drains_s = stage.done, stage.drains_s
            await run.go(stage)
    except (BenchmarkError, TimeoutError, AssertionError) as error:
        run.wrong.append(f"{type(error).__name__}: {error}")
    judged = {name: judging.process(run.histories[name], options.seconds) for name in LASTING}
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "machine": describe(),
        "load": [load, os.getloadavg()[0]],
        "options": asdict(options),
        "seconds": round(time.monotonic() - begin, 1),
        "wrong": run.wrong + [f"{name}: {each}" for name, (_, wrong) in judged.items() for each in wrong],
        "warm_up_s": judging.WARM_UP * options.seconds,
        "memory": {name: figures for name, (figures, _) in judged.items()},
        "outcomes": run.outcomes,
        "faults": done,
        "drain_s": {"median": statistics.median(drains_s), "longest": max(drains_s)} if drains_s else {},
        "said": dict(run.said.most_common()),
        "processes": {name: compact(each) for name, each in run.histories.items()},
    }
