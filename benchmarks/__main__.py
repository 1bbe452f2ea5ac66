"""`python -m benchmarks`: runs every workload for every peer in interleaved rounds.

It prints tables, and writes JSON and pictures.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.peers import PEERS, Kind
from benchmarks.rounds import Figures, Run, rotated
from benchmarks.startup import hello_world, import_time
from benchmarks.table import LATEST, SWEEP, render
from harness.processes import Child, ChildFailed

ROUNDS = 5
QUICK_SHARE = 0.2  # Of the seconds of a measurement.


@dataclass(frozen=True)
class Work:
    """How a workload runs.

    Args:
        sizes: the arguments of the workload; `seconds` are those of one measurement.
        quick: other sizes of a quick run.
        shape: `chain` for three workers that pass requests on.
        rounds: at most in so many rounds.
        own: the processes serve this workload only, and only one peer's processes run at a time.
        full: only with `--full`.
        function: the workload's function, if its name differs.
        settings: environment variables of its processes; only with `own`.
    """

    sizes: Mapping[str, Any] = field(default_factory=dict)
    quick: Mapping[str, Any] = field(default_factory=dict)
    shape: str = ""
    rounds: int = 1_000_000
    own: bool = False
    full: bool = False
    function: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)


WORK = {
    "alone": Work({"seconds": 0.7}),
    "concurrent": Work({"seconds": 0.8}),
    "streams": Work({"seconds": 0.8}),
    "chunks": Work({"seconds": 0.5}),
    "lists": Work({"seconds": 0.5}),
    "unary": Work({"seconds": 0.5}),
    "paced": Work({"seconds": 1.2}),
    "array": Work({"seconds": 0.8, "mib": 16}),
    "pipeline": Work({"seconds": 1.2}, shape="chain"),
    "cancel": Work({"number": 300}, {"number": 40}, shape="chain"),
    # From here on each has processes of its own. The slowest peer needs seconds to open so many streams.
    "idle": Work({"number": 10_000}, {"number": 1_000}, rounds=2, own=True),
    "scrape": Work(
        {"number": 10_000, "scrapes": 20},
        {"number": 1_000, "scrapes": 5},
        rounds=2,
        own=True,
        settings={"TRD_STATUS_PORT": "0"},
    ),
    **{
        f"sweep {number}": Work(
            {"seconds": 0.3, "streams": number, "items": 20}, {"items": 2}, rounds=2, own=True, function="sweep"
        )
        for number in SWEEP
    },
    "gigabyte": Work(
        {"seconds": 0.0, "mib": 1024, "least": 2}, {"mib": 64}, rounds=3, own=True, full=True, function="array"
    ),
}
STARTS = {"hello": 1, "import": 5}
"""The workloads that start processes, and how often in a round."""
NAMES = tuple(dict.fromkeys(name.split()[0] for name in (*WORK, *STARTS)))


class Bench(Run):
    """One run: its workloads, its peers, and all figures so far."""

    def __init__(
        self, names: Iterable[str], peers: Mapping[str, Kind], rounds: int, quick: bool, directory: Path
    ) -> None:
        super().__init__()
        self.names, self.kinds, self.number, self.quick = list(names), peers, rounds, quick
        self.directory = directory
        self._places = 0

    async def run(self) -> None:
        """Run all rounds. In a round each workload runs for all peers before the next, so noise hits them alike."""
        for number in range(self.number):
            print(f"round {number + 1} of {self.number}", flush=True)
            self.peers = rotated(list(self.kinds), number)
            due = [name for name in self.names if name in WORK and number < WORK[name].rounds]
            for shape in ("", "chain"):
                names = [name for name in due if WORK[name].shape == shape and not WORK[name].own]
                await self._together(names, shape, [peer for peer in self.peers if not self.kinds[peer].apart])
                for peer in self.peers:
                    if self.kinds[peer].apart:
                        await self._together(names, shape, [peer])
            for name in due:
                if WORK[name].own:
                    for peer in self._of(name):
                        await self.take(name, peer, functools.partial(self._alone, name, peer))
            for name in self.names:
                if name in STARTS:
                    for peer in self._of(name):
                        await self.take(name, peer, functools.partial(self._start, name, peer))

    def _of(self, name: str) -> list[str]:
        return [peer for peer in self.peers if self.kinds[peer].runs(name.split()[0])]

    async def _together(self, names: list[str], shape: str, peers: list[str]) -> None:
        """Run workloads that share each peer's processes."""
        async with AsyncExitStack() as stack:
            pairs = {}
            for peer in peers:
                wanted = [name for name in names if peer in self._of(name)]
                try:
                    if wanted:
                        pairs[peer] = await stack.enter_async_context(self._pair(peer, shape))
                except ChildFailed as error:
                    for name in wanted:
                        self.fail(name, peer, error)
            for name in names:
                for peer in self._of(name):
                    if peer in pairs:
                        await self.take(name, peer, functools.partial(self._ask, pairs[peer], name, peer))

    async def _alone(self, name: str, peer: str) -> Figures:
        async with self._pair(peer, WORK[name].shape, WORK[name].settings) as pair:
            return await self._ask(pair, name, peer)

    async def _ask(self, pair: Child, name: str, peer: str) -> Figures:
        work = WORK[name]
        sizes = dict(work.sizes)
        if self.quick:
            sizes |= work.quick
            if "seconds" in sizes:
                sizes["seconds"] *= QUICK_SHARE
        if name == "cancel":
            sizes["leaving"] = self.kinds[peer].leaves
        figures: Figures = await pair.ask(work.function or name, **sizes)
        return figures

    async def _start(self, name: str, peer: str) -> Figures:
        if name == "hello":
            return await hello_world(self.kinds[peer], self._place())
        return await import_time(self.kinds[peer], self._place(), 3 if self.quick else STARTS[name])

    @asynccontextmanager
    async def _pair(
        self, peer: str, shape: str = "", settings: Mapping[str, str] = MappingProxyType({})
    ) -> AsyncIterator[Child]:
        place, kind = self._place(), self.kinds[peer]
        child = await Child.start(
            "benchmarks.client",
            peer,
            str(place),
            shape,
            environ={**kind.environ(place), **settings},
            python=kind.python,
            stderr=kind.stderr(place),
        )
        try:
            yield child
        finally:
            await child.stop()

    def _place(self) -> Path:
        # The path is short: that of a Unix socket has at most about 100 bytes.
        self._places += 1
        place = self.directory / str(self._places)
        place.mkdir(mode=0o700)
        return place


def draw_if_possible(path: Path) -> None:
    """Draw the pictures of a result file if matplotlib is installed."""
    if find_spec("matplotlib"):
        subprocess.run([sys.executable, "-m", "benchmarks.plots", path], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What the runtime costs beside its peers")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds over all workloads and peers ({ROUNDS})")
    parser.add_argument("--quick", action="store_true", help="one short round: says that it works, not how fast it is")
    parser.add_argument("--full", action="store_true", help="also the workloads that take minutes and GiBs: gigabyte")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--json", type=Path, help="result file; a whole run's default: benchmarks/results/latest.json")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    missing = {peer: PEERS[peer].missing() for peer in arguments.peers}
    peers = [peer for peer in arguments.peers if missing[peer] is None]
    for peer, what in missing.items():
        if what is not None:
            print(f"{peer} is left out: {what}")
    if arguments.only:
        names = [name for name in (*WORK, *STARTS) if name.split()[0] in arguments.only]
    else:
        names = [name for name in (*WORK, *STARTS) if arguments.full or name in STARTS or not WORK[name].full]
    whole = not (arguments.quick or arguments.only) and all(peer in peers or PEERS[peer].compiled for peer in PEERS)
    path = arguments.json or (LATEST if whole else LATEST.with_name("partial.json"))

    with tempfile.TemporaryDirectory(prefix="trb", dir="/tmp" if os.path.isdir("/tmp") else None) as directory:
        bench = Bench(names, {peer: PEERS[peer] for peer in peers}, rounds, arguments.quick, Path(directory))
        asyncio.run(bench.run())
    sizes = {name: dict(WORK[name].sizes) for name in names if name in WORK}
    result = bench.write(path, rounds=rounds, quick=arguments.quick, sizes=sizes, starts=STARTS)
    print(f"\n{render(result)}")
    draw_if_possible(path)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
