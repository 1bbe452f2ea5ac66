"""Replicas on several cores: `python -m benchmarks.cores`; writes results/cores.json. Status 1 if a target is missed.

One fleet each of 1, 2, 4 and 8 replicas (`trd.run(processes=N)`) serves two handlers: `cpu` computes for some 10 ms in
plain Python, `wait` waits 100 ms, as for another service. Two client processes call them, with 4 or 100 callers for
each replica; each calls again as soon as it has its answer. The fleets stay up, and take turns in each round.

Up to the number of cores, N replicas must answer 0.9 × N as many calls a second as one. A handler that only waits
needs no core, so more replicas than cores also serve more of these calls, while the cores last.

On a machine with other work the processes do not get all cores, and the rates show that work. Three figures do not
depend on it much: `cpu_us`, the processor time of replicas and clients for a call; `cores`, the same for a second; and
`runnable`, the share of the time in which a replica ran or waited for a core. If N replicas take no more CPU for a call
than one, and are as often runnable, they answer N times as many calls where they get N cores.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

import triton_distributed as trd
from benchmarks.rounds import RESULTS, Figures, Run, ratio
from harness.processes import ROOT, Child, ChildFailed, answer_questions, environment_without_settings
from harness.usage import Usage, descendants

FLEETS = (1, 2, 4, 8)
CLIENTS = 2
CALLERS = {"cpu": 4, "wait": 100}  # For each replica, of all clients together.
LOOPS, WAIT_S = 200_000, 0.1
WARM_SHARE = 0.25  # Of the time of a measurement, before it and not counted.
TARGET = 0.9
READY_S = 120.0


@trd.serve("bench.cores.cpu")
async def cpu(request: None) -> int:
    total = 0
    for number in range(LOOPS):
        total += number & 7
    return total


@trd.serve("bench.cores.wait")
async def wait(request: None) -> int:
    await asyncio.sleep(WAIT_S)
    return 0


async def client() -> None:
    """Answer `measure` with the calls a second in the measured time, and the number of all calls."""
    connections: dict[str, trd.Connection] = {}

    async def measure(question: str, directory: str, kind: str, replicas: int, seconds: float) -> tuple[float, int]:
        here = connections.get(directory)
        if here is None:
            here = connections[directory] = trd.connect(trd.Config(directory=Path(directory)))
        await here.wait_for_instances(f"bench.cores.{kind}", replicas, timeout=READY_S)
        calls = counted = 0
        begin = time.perf_counter() + WARM_SHARE * seconds
        end = begin + seconds

        async def caller() -> None:
            nonlocal calls, counted
            while time.perf_counter() < end:
                await here.call(f"bench.cores.{kind}", None, policy="least_loaded", idempotent=True)
                calls += 1
                counted += begin <= time.perf_counter() < end

        await asyncio.gather(*(caller() for _ in range(CALLERS[kind] * replicas // CLIENTS)))
        return counted / seconds, calls

    try:
        await answer_questions(measure)
    finally:
        for each in connections.values():
            await each.close()


async def ready(process: asyncio.subprocess.Process) -> None:
    assert process.stdout is not None
    while line := await process.stdout.readline():
        if line.startswith(b"ready: "):
            return
    raise ChildFailed(f"the supervisor ended with status {await process.wait()}")


async def measured(clients: list[Child], pid: int, folder: Path, replicas: int, kind: str, seconds: float) -> Figures:
    running = descendants(pid)
    usage = Usage([pid, *running, *(each.process.pid for each in clients)])
    begin, runnable = time.perf_counter(), sum(map(runnable_s, running))
    asked = {"directory": str(folder), "kind": kind, "replicas": replicas, "seconds": seconds}
    answers = await asyncio.gather(*(each.ask("measure", **asked) for each in clients))
    cpu_s, took_s = usage.cpu_s(), time.perf_counter() - begin
    return {
        "per_s": sum(rate for rate, _ in answers),
        "cpu_us": cpu_s / sum(calls for _, calls in answers) * 1e6,
        "cores": cpu_s / took_s,
        "runnable": (sum(map(runnable_s, running)) - runnable) / took_s / replicas,
    }


def runnable_s(pid: int) -> float:
    """Seconds in which the main thread of a process has run or waited for a core; 0 if the system does not tell."""
    try:
        ran, waited, _ = map(int, Path(f"/proc/{pid}/schedstat").read_text().split())
    except OSError:
        return 0.0
    return (ran + waited) / 1e9


async def run(rounds: int, seconds: float, folder: Path) -> Run:
    measurements = Run()
    fleets: dict[int, asyncio.subprocess.Process] = {}
    clients: list[Child] = []
    try:
        for count in FLEETS:
            (directory := folder / str(count)).mkdir(mode=0o700)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "benchmarks.cores", "worker", str(count)),
                cwd=ROOT,
                env={**environment_without_settings(), "TRD_DIR": str(directory)},
                stdout=asyncio.subprocess.PIPE,
            )
            fleets[count] = process
            await asyncio.wait_for(ready(process), READY_S)
        while len(clients) < CLIENTS:
            clients += [await Child.start("benchmarks.cores", "client", environ={})]
        await measurements.interleave(
            rounds,
            {
                (kind, str(count)): partial(measured, clients, process.pid, folder / str(count), count, kind, seconds)
                for kind in CALLERS
                for count, process in fleets.items()
            },
        )
    finally:
        for child in clients:
            await child.stop()
        for process in fleets.values():
            if process.returncode is None:
                process.terminate()
            await process.wait()
    return measurements


def report(result: dict[str, Any]) -> bool:
    """Print the table; return whether all targets are met."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    print("\n| replicas | handler | calls/s | ÷ one replica | target | CPU µs a call | cores used | runnable |")
    print("| --: | --- | --: | --- | --- | --: | --: | --: |")
    good = True
    for kind, figures in result["figures"].items():
        for count in FLEETS:
            if "per_s" not in (taken := figures.get(str(count), {})):
                good = False
                continue
            rate, cpu, used, runnable = (taken[name][0] for name in ("per_s", "cpu_us", "cores", "runnable"))
            times = target = ""
            if count > 1 and (found := ratio(result["rounds"], kind, str(count), "1", "per_s")):
                middle, low, high = found
                times = f"{middle:.2f} ({low:.2f}–{high:.2f})"
                if count <= cores:
                    met = middle >= TARGET * count
                    good = good and met
                    target = f"{TARGET * count:g}: {'met' if met else 'MISSED'}"
            print(f"| {count} | {kind} | {rate:,.0f} | {times} | {target} | {cpu:,.0f} | {used:.2f} | {runnable:.2f} |")
    return good


def main() -> int:
    match sys.argv[1:]:
        case ["worker", count]:
            trd.run(processes=int(count))
            return 0
        case ["client"]:
            uvloop.run(client())
            return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cores", description="Replicas on several cores")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all fleets and handlers (5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds of each measurement (3)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trb", dir="/tmp" if os.path.isdir("/tmp") else None) as folder:
        measurements = uvloop.run(run(arguments.rounds, arguments.seconds, Path(folder)))
    path = RESULTS / "cores.json"
    sizes = {"seconds": arguments.seconds, "callers": CALLERS, "clients": CLIENTS, "wait_s": WAIT_S}
    result = measurements.write(path, rounds=arguments.rounds, quick=arguments.seconds < 1, **sizes)
    return 0 if report(result) and not result["failures"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
