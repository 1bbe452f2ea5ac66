"""`python -m harness.runs.soak` (`make soak`): minutes of mixed load with faults, and a search for leaks."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.fleet import PLANES, Fleet, plane
from harness.processes import ChildFailed, environment_without_settings
from harness.report import RESULTS, Setting, renew
from harness.soak import judging
from harness.soak.members import STEADY
from harness.soak.table import render
from harness.waiting import PATIENCE_S
from triton_distributed.testing import FaultProxy
from triton_distributed.testing.servers import free_port

RESULT = RESULTS / "soak.json"
PROXIED, RESTARTED = "proxied", "restarted"
WORKERS = {STEADY: "uvloop", PROXIED: "asyncio", RESTARTED: "asyncio"}  # With the loop that each begins with.
CLIENTS = {"client-asyncio": "asyncio", "client-uvloop": "uvloop"}
PROCESSES = (*WORKERS, *CLIENTS)
LASTING = [name for name in PROCESSES if name != RESTARTED]
FAULT_S = 5.0  # Seconds between two faults. Every other fault is a restart.
QUIET_S = 60.0
SAMPLE_S = 3.0
LOOK_S = 0.25  # Seconds between two checks whether all processes are idle.
STOPPED_S = 1.0
# Glibc maps large blocks separately. By default it raises the size limit for that to the largest block ever freed. Then
# arrays of up to 1 MiB are in its heap, and holes in the heap change resident memory by 5 MiB while allocated memory
# changes by less than 0.1 MiB. A leak could not be distinguished from that.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10), "MALLOC_TRIM_THRESHOLD_": str(128 << 10)}
THREADS = "2"  # The threads of a worker's handlers. `touch` starts all of them.


@dataclass
class Options:
    """The options of a soak.

    Attributes:
        seconds: the length of the load.
        rate: calls a second of each client.
        seed: the seed of the mix and of the faults.
        plane: see `harness.fleet.PLANES`.
        trace: report where gained memory was allocated.
        rests: the number of quiet moments in a run of at most five minutes; a longer run has one every minute.
        settle_s: seconds that a quiet moment may last until no count is above its earlier values.
        work: the part of the workers, for tests of the soak itself.
    """

    seconds: float = 600.0
    rate: float = 60.0
    seed: int = 1
    plane: str = "unix"
    trace: bool = False
    rests: int = 5
    settle_s: float = PATIENCE_S
    work: str = "harness.soak.members:work"


@dataclass
class Stage:
    """All processes of a soak, and the faults that they suffer.

    Attributes:
        broken: ids of instances whose streams may break: killed ones, and the one whose connections are cut.
        done: how often each fault was made.
        drains_s: the times that workers took to end after a request to do so.
        logged: the log counts of processes that have ended.
    """

    fleet: Fleet
    proxy: FaultProxy | None
    broken: set[int] = field(default_factory=set)
    done: Counter[str] = field(default_factory=Counter)
    drains_s: list[float] = field(default_factory=list)
    logged: list[dict[str, Any]] = field(default_factory=list)

    async def ask(self, question: str, **arguments: Any) -> dict[str, Any]:
        """Return the answers of all processes, by name."""
        return await self.fleet.ask(PROCESSES, question, **arguments)

    async def make(self, fault: signal.Signals | str, rate: float) -> None:
        """Make one fault: a signal for the worker that is restarted, or a name.

        Args:
            fault: the fault.
            rate: the rate of the load, which continues in a successor.

        Raises:
            ChildFailed: a worker did not drain and exit with status 0.
        """
        if isinstance(fault, signal.Signals):
            await self._restart(fault == signal.SIGKILL)
            await self.fleet.ask([RESTARTED], "go", rate=rate)
        elif fault == "stop":
            await self.fleet.pause(STEADY, STOPPED_S)
            self.done["stopped"] += 1
        elif self.proxy is not None:
            self.proxy.cut(reset=fault == "reset")
            self.done[fault] += 1

    async def _restart(self, kill: bool) -> None:
        """End the worker to restart, and start a successor on the other loop."""
        worker = self.fleet.processes[RESTARTED]
        self.logged.append(await worker.ask("logged"))
        worker.options["loop"] = "uvloop" if worker.options["loop"] == "asyncio" else "asyncio"
        if kill:
            self.broken.add(worker.instance_id)
            await self.fleet.kill(RESTARTED)
            await self.fleet.replace(RESTARTED)
        else:
            self.drains_s.append((await self.fleet.restart(RESTARTED))[1])
        self.done["killed" if kill else "ended"] += 1


@asynccontextmanager
async def staged(options: Options) -> AsyncIterator[Stage]:
    """Start all processes of a soak, with the servers that they need. Their load has not begun."""
    async with AsyncExitStack() as stack:
        _, settings = await stack.enter_async_context(plane(options.plane))
        settings |= MALLOC
        own: dict[str, dict[str, str]] = {name: {} for name in WORKERS}
        proxy = None
        if options.plane != "nats":  # NATS has no direct connections to cut.
            address = f"tcp://127.0.0.1:{free_port()}"
            proxy = await stack.enter_async_context(FaultProxy(address))
            own[PROXIED] = {"TRD_LISTEN": address, "TRD_ADVERTISE": proxy.address.removeprefix("tcp://")}
        fleet = await stack.enter_async_context(Fleet(settings))
        trace = {"trace": "1"} if options.trace else {}
        workers = (
            fleet.start(name, options.work, options={"loop": loop, **trace}, TRD_THREADS=THREADS, **own[name])
            for name, loop in WORKERS.items()
        )
        await asyncio.gather(*workers)
        clients = (
            fleet.start(name, f"harness.soak.members:call:{options.seed}:{n}", options={"loop": loop, **trace})
            for n, (name, loop) in enumerate(CLIENTS.items())
        )
        await asyncio.gather(*clients)
        yield Stage(fleet, proxy, {fleet.processes[PROXIED].instance_id})


def faults(rng: random.Random) -> list[signal.Signals | str]:
    """Return the repeated order of faults. Every other fault is a restart."""
    others = ["reset", "stop", "cut"]
    rng.shuffle(others)
    ends = (signal.SIGKILL, signal.SIGTERM)
    return [each for k, other in enumerate(others * 2) for each in (ends[k % 2], other)]


class Run:
    """A soak under way.

    Args:
        say: gets each line of progress.

    Attributes:
        histories: for each process, the `samples` under load, the `quiet` moments, and the growth between these.
        wrong: descriptions of what went wrong.
    """

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self.options, self._say = options, say
        self.histories: dict[str, dict[str, Any]] = {
            name: {"samples": [], "quiet": [], "growths": {"types": {}, "kept": {}, "traced": []}} for name in PROCESSES
        }
        self.wrong: list[str] = []
        self.outcomes: dict[str, Counter[str]] = {}
        self.logged: Counter[str] = Counter()
        self._began = 0.0  # Every rest moves it to later.
        self._rests_since: float | None = None
        self._loaded = asyncio.Event()
        self._least: dict[str, tuple[int, ...]] | None = None  # The smallest counts after the warm-up.

    @property
    def _at(self) -> float:
        """Seconds of load so far."""
        return (self._rests_since or time.monotonic()) - self._began

    async def go(self, stage: Stage) -> None:
        """Run the whole load. Stop at the first quiet moment at which something is wrong."""
        seconds = self.options.seconds
        fault_s, quiet_s = min(FAULT_S, seconds / 4), min(QUIET_S, seconds / self.options.rests)
        self._began = time.monotonic()
        await self._settle(stage)
        sampling = asyncio.create_task(self._sample(stage))
        making, made = faults(random.Random(self.options.seed)), 0
        try:
            await self._load(stage)
            rests = 1
            while True:  # On a slow machine all steps are later, but in the same order.
                next_fault, next_quiet = (made + 1) * fault_s, min(rests * quiet_s, seconds)
                await asyncio.sleep(max(0.0, min(next_fault, next_quiet) - self._at))
                if sampling.done():
                    sampling.result()
                if next_quiet > next_fault:
                    await stage.make(making[made % len(making)], self.options.rate)
                    made += 1
                    continue
                if not await self._quiet(stage, next_quiet / seconds) or next_quiet >= seconds:
                    break
                rests += 1
                await self._load(stage)
        finally:
            sampling.cancel()
            await asyncio.wait({sampling})
        for name, growths in (await stage.ask("growths")).items():
            self.histories[name]["growths"] = growths

    async def _load(self, stage: Stage) -> None:
        await stage.ask("go", rate=self.options.rate)
        assert self._rests_since is not None
        self._began += time.monotonic() - self._rests_since
        self._rests_since = None
        self._loaded.set()

    async def _sample(self, stage: Stage) -> None:
        while True:
            await self._loaded.wait()
            for name in PROCESSES:
                try:
                    sample = (await stage.fleet.ask([name], "sample"))[name]
                except ChildFailed:
                    if name != RESTARTED:
                        raise
                    continue  # It was killed before it answered.
                if self._loaded.is_set():
                    self.histories[name]["samples"].append({"at": round(self._at, 1), **sample})
            await asyncio.sleep(min(SAMPLE_S, self.options.seconds / 50))

    async def _settle(self, stage: Stage) -> dict[str, Any]:
        """Stop all activity, and return the resources of each process."""
        self._loaded.clear()
        self._rests_since = time.monotonic()
        for group in (CLIENTS, WORKERS):  # Clients first, as their calls keep the workers busy.
            await stage.fleet.ask(group, "rest")
        await stage.ask("touch", ids=stage.fleet.ids(WORKERS))
        end, before = time.monotonic() + self.options.settle_s, None
        while True:
            looks = await stage.ask("quiet")
            for name, news in (await stage.ask("news")).items():
                looks[name]["news"] = news
            now = _counted(looks)
            settled = now == before and self._no_more(now) and not judging.events(_news(looks))
            if settled or time.monotonic() > end:
                return looks
            before = now
            await asyncio.sleep(LOOK_S)

    def _no_more(self, now: dict[str, tuple[int, ...]]) -> bool:
        """Whether no count is above those of the earlier quiet moments."""
        least = self._least
        return least is None or all(a <= b for name in LASTING for a, b in zip(now[name], least[name], strict=True))

    async def _quiet(self, stage: Stage, part: float) -> bool:
        """Check a quiet moment; return whether all is well and no process holds more than before.

        Args:
            part: the part of the run that is over.
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
                await stage.ask("baseline")
            least = least or now
            self._least = {name: tuple(map(min, now[name], least[name])) for name in LASTING}
        await self._tell(stage)
        words = (f"{name} {look['rss'] / 2**20:.1f} MiB {look['descriptors']} fds" for name, look in looks.items())
        self._say(f"{at:5.0f} s: {', '.join(words)}; {sum(map(Counter.total, self.outcomes.values())):,} calls")
        return well and not self.wrong

    async def _tell(self, stage: Stage) -> None:
        """Collect the clients' counts and the processes' log counts."""
        tallies = list((await stage.fleet.ask(CLIENTS, "tally")).values())
        self.outcomes = {kind: Counter() for kind in tallies[0]["outcomes"]}
        lost: Counter[int] = Counter()
        for tally in tallies:
            for kind, counts in tally["outcomes"].items():
                self.outcomes[kind].update(counts)
            lost.update({int(instance): count for instance, count in tally["broken"].items()})
        logged = [*stage.logged, *(await stage.ask("logged")).values()]
        found = [
            *(each for tally in tallies for each in tally["failures"]),
            *judging.lost(lost, stage.broken),
            *(f"logged: {fault}" for each in logged for fault in each["faults"]),
        ]
        self.wrong += [each for each in found if each not in self.wrong]
        self.logged = sum((Counter(each["counts"]) for each in logged), Counter[str]())


def _counted(looks: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(looks[name][what] for what in judging.COUNTED) for name in LASTING}


def _news(looks: dict[str, Any]) -> dict[str, Any]:
    return {name: look["news"] for name, look in looks.items()}


def compact(history: dict[str, Any]) -> dict[str, Any]:
    """Return a history with a list for each figure of its samples, instead of a dict for each sample."""
    samples = history["samples"]
    return {**history, "samples": {what: [each[what] for each in samples] for what in samples[0]} if samples else {}}


async def soak(options: Options, command: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Run a soak; return its result, in which `wrong` is empty if all is well.

    Args:
        command: the command that repeats the run.
        say: gets each line of progress.
    """
    run, setting = Run(options, say), Setting()
    begin = time.monotonic()
    done: Counter[str] = Counter()
    drains_s: list[float] = []
    try:
        async with staged(options) as stage:
            done, drains_s = stage.done, stage.drains_s
            await run.go(stage)
    except (ChildFailed, TimeoutError, AssertionError) as error:
        run.wrong.append(f"{type(error).__name__}: {error}")
    judged = {name: judging.process(run.histories[name], options.seconds) for name in LASTING}
    return {
        **setting.as_json(),
        "command": command,
        "options": asdict(options),
        "seconds": round(time.monotonic() - begin, 1),
        "wrong": run.wrong + [f"{name}: {each}" for name, (_, wrong) in judged.items() for each in wrong],
        "warm_up_s": judging.WARM_UP * options.seconds,
        "memory": {name: figures for name, (figures, _) in judged.items()},
        "outcomes": run.outcomes,
        "faults": done,
        "drain_s": {"median": statistics.median(drains_s), "longest": max(drains_s)} if drains_s else {},
        "logged": dict(run.logged.most_common()),
        "processes": {name: compact(each) for name, each in run.histories.items()},
    }


def main() -> int:
    defaults = Options()
    parser = argparse.ArgumentParser(
        prog="python -m harness.runs.soak", description="Minutes of mixed load, and what stays"
    )
    parser.add_argument("--minutes", type=float, default=defaults.seconds / 60, help="length of the load (10)")
    parser.add_argument("--rate", type=float, default=defaults.rate, help="calls a second of each of two clients (60)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of the mix and of the faults (1)")
    parser.add_argument("--plane", choices=PLANES, default=defaults.plane, help="how requests and workers are carried")
    parser.add_argument("--trace", action="store_true", help="tell where memory that was gained was allocated; slow")
    parser.add_argument("--output", type=Path, help="write the result there; results/soak.json also renews the page")
    arguments = parser.parse_args()
    if not (arguments.minutes > 0 and arguments.rate > 0):
        parser.error("--minutes and --rate are above 0")
    names = ("rate", "seed", "plane", "trace")
    options = Options(seconds=arguments.minutes * 60, **{name: getattr(arguments, name) for name in names})
    for name in set(os.environ) - set(environment_without_settings()):
        if not name.endswith("_BIN"):
            del os.environ[name]
    command = " ".join(["python -m harness.runs.soak", *sys.argv[1:]])
    result = asyncio.run(soak(options, command, lambda line: print(line, flush=True)))
    print(render(result))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
        if arguments.output.resolve() == RESULT and not result["wrong"]:
            renew("soak", render(result))
    for name, history in result["processes"].items():
        for each in history["growths"]["traced"]:
            print(f"\n{name}: {each}")
    for each in result["wrong"]:
        print(f"WRONG: {each}", file=sys.stderr)
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
