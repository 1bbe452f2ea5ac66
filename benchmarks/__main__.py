"""`python -m benchmarks`: runs every workload for every peer in interleaved rounds; prints a table, writes JSON."""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import tempfile
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.peers import PEERS
from benchmarks.rounds import Figures, Run, rotated
from benchmarks.startup import hello_world, import_time
from benchmarks.table import LATEST, render
from harness.processes import Child, ChildFailed

# The workloads that share a pair of processes in a round, with the seconds of each measurement.
RATES = {"alone": 1.0, "concurrent": 1.5, "streams": 1.5, "paced": 2.0, "array": 1.0}
# The workloads with their own processes, and what they count.
IDLE_STREAMS, CANCELLATIONS, IMPORTS = 10_000, 300, 10
MEMORY_ROUNDS = 3  # Resident memory hardly varies, and the slowest peer needs seconds to open the streams.
NAMES = (*RATES, "idle", "cancel", "hello", "import")


class Bench(Run):
    """One run: its workloads, its peers, and all figures so far."""

    def __init__(self, names: Iterable[str], peers: Iterable[str], rounds: int, quick: bool, directory: Path) -> None:
        super().__init__()
        self.names, self.all_peers, self.number, self.quick = list(names), list(peers), rounds, quick
        self.directory = directory
        self._places = 0

    async def run(self) -> None:
        """Run all rounds. In a round each workload runs for all peers before the next, so noise hits them alike."""
        for number in range(self.number):
            print(f"round {number + 1} of {self.number}", flush=True)
            self.peers = rotated(self.all_peers, number)
            await self._rates()
            if number < MEMORY_ROUNDS:
                await self._alone("idle", self.peers, "", number=1_000 if self.quick else IDLE_STREAMS)
            for family in ("ours", "grpc.aio"):
                peers = [peer for peer in self.peers if PEERS[peer].family == family]
                number = 40 if self.quick else CANCELLATIONS
                # A grpc.aio call continues when its `async for` is left. So there the task is cancelled every time.
                await self._alone("cancel", peers, "chain", number=number, leaving=family == "ours")
            if "ours" in self.peers:
                if "hello" in self.names:
                    await self.take("hello", "ours", lambda: hello_world(self._place()))
                if "import" in self.names:
                    await self.take("import", "ours", lambda: import_time(5 if self.quick else IMPORTS))

    async def _rates(self) -> None:
        names = [name for name in RATES if name in self.names]
        if not names:
            return
        async with AsyncExitStack() as stack:
            pairs = {}
            for peer in self.peers:
                try:
                    pairs[peer] = await stack.enter_async_context(self._pair(peer))
                except ChildFailed as error:
                    for name in names:
                        self.fail(name, peer, error)
            for name in names:
                seconds = RATES[name] * (0.2 if self.quick else 1)
                for peer, pair in pairs.items():
                    await self.take(name, peer, functools.partial(pair.ask, name, seconds=seconds))

    async def _alone(self, name: str, peers: Iterable[str], shape: str, **sizes: Any) -> None:
        if name not in self.names:
            return
        for peer in peers:

            async def measure(peer: str = peer) -> Figures:
                async with self._pair(peer, shape) as pair:
                    figures: Figures = await pair.ask(name, **sizes)
                    return figures

            await self.take(name, peer, measure)

    @asynccontextmanager
    async def _pair(self, peer: str, shape: str = "") -> AsyncIterator[Child]:
        place = self._place()
        environ = {"TRD_DIR": str(place)}
        if PEERS[peer].tcp:
            environ["TRD_LISTEN"] = "tcp://127.0.0.1:0"
        child = await Child.start("benchmarks.client", peer, str(place), shape, environ=environ)
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What the runtime costs beside its peers")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all workloads and peers (5)")
    parser.add_argument("--quick", action="store_true", help="one short round: says that it works, not how fast it is")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--json", type=Path, help="result file; a whole run's default: benchmarks/results/latest.json")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    peers = [peer for peer in arguments.peers if PEERS[peer].available()]
    for peer in arguments.peers:
        if peer not in peers:
            print(f"{peer} is left out: {PEERS[peer].needs} is not installed here")
    whole = not arguments.quick and set(arguments.only) == set(NAMES) and set(peers) == set(PEERS)
    path = arguments.json or (LATEST if whole else LATEST.with_name("partial.json"))

    with tempfile.TemporaryDirectory(prefix="trb", dir="/tmp" if os.path.isdir("/tmp") else None) as directory:
        bench = Bench(arguments.only, peers, rounds, arguments.quick, Path(directory))
        asyncio.run(bench.run())
    result = bench.write(
        path,
        rounds=rounds,
        quick=arguments.quick,
        seconds=RATES,
        idle_streams=IDLE_STREAMS,
        cancellations=CANCELLATIONS,
        imports=IMPORTS,
    )
    print(f"\n{render(result)}")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
