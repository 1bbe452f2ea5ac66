"""`python -m benchmarks.llm COMMAND`: the front end for models beside other systems. It writes a result.

- `overhead`: requests whose answer comes at once, whole (`whole`) and as a stream of one output (`single`): requests/s,
  and the processor time of the servers for a request.
- `chunks`: streams of 200 tokens, as fast as they come (`chunks`) and with a token every 10 ms (`paced`): the processor
  time for an event.
- `gaps`: 1,000 streams with 50 tokens a second each: the time between the tokens of a stream as its reader sees it,
  beside the time between them at the engine.

See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import environments
from benchmarks.llm import servers, wrk
from benchmarks.llm.processes import Processes, Server, answered
from benchmarks.llm.reader import AnswerFailed
from benchmarks.llm.steps import read_gaps
from benchmarks.llm.work import CHUNKS, PACED, SINGLE, STEPS, WHOLE, Work
from benchmarks.peers import compiled_build
from benchmarks.rounds import RESULTS, Figures, Run
from benchmarks.table import MODELS, render_foreign
from benchmarks.workloads import WARM_UP_SHARE, quantile
from harness.processes import Child, ChildFailed
from harness.usage import LINUX

Start = Callable[[Processes, Sequence[Work]], Awaitable[Server]]
WORKS = {"overhead": (WHOLE, SINGLE), "chunks": (CHUNKS, PACED), "gaps": (STEPS,)}
DYNAMO = {
    "Dynamo": servers.dynamo("worker"),
    "Dynamo, mocker": servers.dynamo("mocker"),
    "Dynamo, echo": servers.dynamo("echo"),
    "Dynamo, HttpService": servers.dynamo("service"),
}
FOREIGN = {"LiteLLM": "litellm", **dict.fromkeys(DYNAMO, "dynamo")}
"""Other systems, and their environments."""
STARTS: dict[str, Start] = {
    "ours": servers.ours,
    "ours-compiled": partial(servers.ours, compiled=True),
    **DYNAMO,
}
PEERS = ("ours", "ours-compiled", "bare", *FOREIGN)
LACKS = {PACED: ("LiteLLM",), STEPS: ("LiteLLM", "Dynamo, mocker", "Dynamo, echo")}
"""LiteLLM is too slow for a pace. The engines of the others do not note their gaps."""
CONNECTIONS = {WHOLE: 32, SINGLE: 32, CHUNKS: 16, PACED: 128}
SECONDS = {WHOLE: 3.0, SINGLE: 3.0, CHUNKS: 3.0, PACED: 3.0, STEPS: 10.0}
ROUNDS = {"overhead": 4, "chunks": 3, "gaps": 3}  # Less than five minutes for each command.
SETTLE_S = 2.0


class Bench(Run):
    """One run of a command."""

    def __init__(self, stack: AsyncExitStack, folder: Path, reader: Child, seconds: float | None, streams: int) -> None:
        super().__init__()
        self._stack, self._folder, self._reader = stack, folder, reader
        self._seconds, self._streams = seconds, streams
        self._processes = Processes(stack, folder)
        self._made = 0

    async def start(self, command: str, peers: Sequence[str]) -> dict[tuple[str, str], Server]:
        """Start the servers of `overhead` or `chunks`. One that does not start is a failure of its workloads."""
        works = WORKS[command]
        found: dict[tuple[str, str], Server] = {}
        bodies = await self.bodies(works)
        bare = await servers.bare(self._processes, works, bodies)
        for peer in peers:
            measured = [each for each in works if peer not in LACKS.get(each, ())]
            # Dynamo's echo and mocker have one model and one kind of answer, so each workload has processes of its own.
            alone = peer in ("Dynamo, echo", "Dynamo, mocker")
            for group in [[each] for each in measured] if alone else [measured]:
                try:
                    if peer == "bare":
                        server = bare
                    elif peer == "LiteLLM":
                        server = await servers.litellm(self._processes, group, bare)
                    else:
                        server = await STARTS[peer](self._processes, group)
                except ChildFailed as error:
                    for work in group:
                        self.fail(work.name, peer, error)
                    continue
                found |= {(work.name, peer): server for work in group}
        return found

    async def bodies(self, works: Sequence[Work]) -> dict[str, bytes]:
        """Return what our front end answers. It runs only for that."""
        async with AsyncExitStack() as stack:
            folder = self._folder / f"answers-{self._made}"
            self._made += 1
            folder.mkdir()
            server = await servers.ours(Processes(stack, folder), works)
            return {each.name: await asyncio.to_thread(answered, server, each) for each in works}

    async def overhead(self, work: Work, server: Server) -> Figures:
        """Measure a server with one request after another on each connection."""
        seconds = self._seconds or SECONDS[work]
        for length in (seconds * WARM_UP_SHARE, seconds):
            try:
                if work in (WHOLE, SINGLE) and wrk.program():
                    target = (server.port, server.path(work), server.body(work))
                    told = await wrk.load(self._folder, *target, CONNECTIONS[work], length, server.pids)
                else:
                    told = await self.ask("load", work, server, CONNECTIONS[work], seconds=length)
            except AnswerFailed as error:
                raise ChildFailed(str(error)) from error
        count = told["events"] if work.each else told["requests"]
        if not count:
            raise ChildFailed("no answer came")
        used, passed = told["servers_s"], told["seconds"]
        return {
            "per_s": count / told["loaded_s"],
            "cpu_us": sum(used) / count * 1e6,
            "front_us": used[0] / count * 1e6,
            **({} if work.each else {"p50_ms": told["p50_ms"], "p99_ms": told["p99_ms"]}),
            "front_cores": used[0] / passed,
            "client_cores": told["client_s"] / passed,
        }

    async def ask(self, question: str, work: Work, server: Server, connections: int, **more: Any) -> dict[str, Any]:
        """Ask the reader."""
        found: dict[str, Any] = await self._reader.ask(
            question,
            port=server.port,
            path=server.path(work),
            body=server.body(work),
            connections=connections,
            pids=list(server.pids),
            **more,
        )
        return found

    async def gaps(self, peer: str, bodies: dict[str, bytes]) -> Figures:
        """Measure the gaps of a server of its own, which writes those of its engine when it ends."""
        seconds = self._seconds or SECONDS[STEPS]
        self._made += 1
        folder = self._folder / f"gaps-{self._made}"
        folder.mkdir()
        async with AsyncExitStack() as stack:
            processes = Processes(stack, folder)
            if peer == "bare":
                server = await servers.bare(processes, [STEPS], bodies)
            else:
                server = await STARTS[peer](processes, [STEPS])
            told = await self.ask("gaps", STEPS, server, self._streams, settle_s=SETTLE_S, seconds=seconds)
        engine = read_gaps(next(folder.glob("**/gaps")), told["began"], told["ended"])
        if not engine or not told["reads"]:
            raise ChildFailed(f"{len(engine)} gaps at the engine, {told['reads']} at the client")
        front, *others = (each / seconds for each in told["servers_s"])
        engine_p99_ms = quantile(engine, 0.99) * 1e3
        return {
            "p50_ms": told["p50_ms"],
            "p99_ms": told["p99_ms"],
            "max_ms": told["max_ms"],
            "engine_p99_ms": engine_p99_ms,
            "engine_max_ms": engine[-1] * 1e3,
            "p99_over_engine": told["p99_ms"] / engine_p99_ms,
            "per_s": told["events"] / seconds,
            "of_due": told["events"] / seconds / self._streams * STEPS.step_s,
            "events_each": told["events"] / told["reads"],
            "front_us": told["servers_s"][0] / told["events"] * 1e6,
            "front_cores": front,
            "worker_cores": sum(others),
            "client_cores": told["client_s"] / seconds,
        }


def left_out(peers: Sequence[str]) -> dict[str, str]:
    """Return the peers that cannot be measured here, each with the reason. Make the environments of the others."""
    found = {}
    for peer in peers:
        if peer == "ours-compiled" and compiled_build() is None:
            found[peer] = "there is no compiled build of these sources"
        elif peer in FOREIGN:
            try:
                environments.make(FOREIGN[peer])
            except environments.NotInstalled as error:
                found[peer] = str(error)
    return found


async def run(arguments: argparse.Namespace, peers: Sequence[str], folder: Path) -> Bench:
    """Measure in rounds."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with AsyncExitStack() as stack:
        reader = await Child.start("benchmarks.llm.reader", environ={})
        stack.push_async_callback(reader.stop)
        bench = Bench(stack, folder, reader, arguments.seconds, arguments.streams)
        if arguments.command == "gaps":
            bodies = await bench.bodies([STEPS])
            measures = {(STEPS.name, peer): partial(bench.gaps, peer, bodies) for peer in peers}
        else:
            started = await bench.start(arguments.command, peers)
            order = [(work, peer) for work in WORKS[arguments.command] for peer in peers]
            measures = {
                (work.name, peer): partial(bench.overhead, work, started[work.name, peer])
                for work, peer in order
                if (work.name, peer) in started
            }
        await bench.interleave(arguments.rounds, measures)
    return bench


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llm", description="The front end for models")
    parser.add_argument("command", choices=WORKS, help="what is measured")
    told = ", ".join(f"{name}: {count}" for name, count in ROUNDS.items())
    parser.add_argument("--rounds", type=int, help=f"rounds over all peers ({told})")
    parser.add_argument("--seconds", type=float, help="seconds of each measurement (3; gaps: 10)")
    parser.add_argument("--streams", type=int, default=1000, help="streams of gaps (1000)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, metavar="PEER", help="; ".join(PEERS))
    parser.add_argument("--json", type=Path, help="result file; a whole run's default: results/llm-COMMAND.json")
    arguments = parser.parse_args()
    if not LINUX:
        raise SystemExit("CPU is counted for each process, which only Linux tells")
    lacking = [LACKS.get(work, ()) for work in WORKS[arguments.command]]
    asked = [each for each in arguments.peers if not all(each in lacks for lacks in lacking)]
    arguments.rounds = arguments.rounds or ROUNDS[arguments.command]
    without = left_out(asked)
    for peer, reason in without.items():
        print(f"{peer} is left out: {reason}")
    peers = [each for each in asked if each not in without]
    whole = set(arguments.peers) == set(PEERS) and arguments.seconds is None and arguments.streams == 1000
    path = arguments.json or RESULTS / (f"llm-{arguments.command}.json" if whole else "partial-llm.json")
    with tempfile.TemporaryDirectory(prefix="trb", dir="/tmp" if Path("/tmp").is_dir() else None) as folder:
        try:
            bench = asyncio.run(run(arguments, peers, Path(folder)))
        except asyncio.CancelledError:
            return 128 + signal.SIGTERM
    result = bench.write(
        path,
        rounds=arguments.rounds,
        quick=not whole,
        load="wrk" if wrk.program() else "benchmarks/llm/reader.py",
        sizes={work.name: {"tokens": work.tokens, "step_s": work.step_s} for work in WORKS[arguments.command]},
        connections={work.name: CONNECTIONS.get(work, arguments.streams) for work in WORKS[arguments.command]},
        seconds={work.name: arguments.seconds or SECONDS[work] for work in WORKS[arguments.command]},
        versions={peer: environments.versions(FOREIGN[peer]) for peer in peers if peer in FOREIGN},
        left_out=without,
    )
    print(f"\n{render_foreign(result, MODELS[f'llm-{arguments.command}.json'])}", end="")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
