"""`python -m benchmarks.foreign`: ours beside other systems, in interleaved rounds.

It prints a table, and writes JSON and pictures.

Each of them is installed in an environment of its own, which is made first: see benchmarks/environments. One that
cannot be installed here is left out, and the result says so.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from pathlib import Path

from benchmarks.__main__ import STARTS, WORK, Bench, draw_if_possible
from benchmarks.environments import versions
from benchmarks.peers.foreign import EVERY, FOREIGN
from benchmarks.rounds import RESULTS
from benchmarks.table import render_foreign
from harness.usage import LINUX

ROUNDS = 4  # A round takes some 3 minutes, a third of it for the start of Ray.
OURS = ("ours", "ours-compiled", "yardstick", "grpc.aio")
PEERS = (*OURS, *FOREIGN)
NAMES = ("alone", "concurrent", "streams", "paced", "array", "cancel", "hello")
LATEST = RESULTS / "peers.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.foreign", description="Ours beside other systems")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds over all workloads and peers ({ROUNDS})")
    parser.add_argument("--quick", action="store_true", help="one short round: says that it works, not how fast it is")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--peers", nargs="+", choices=EVERY, default=PEERS, metavar="PEER", help=", ".join(EVERY))
    parser.add_argument("--json", type=Path, help="result file; a whole run's default: benchmarks/results/peers.json")
    arguments = parser.parse_args()
    if not LINUX:
        raise SystemExit("CPU and memory are counted over all processes of a peer, which only Linux tells")
    left_out = {peer: reason for peer in arguments.peers if (reason := EVERY[peer].missing())}
    for peer, reason in left_out.items():
        print(f"{peer} is left out: {reason}")
    peers = {peer: EVERY[peer] for peer in arguments.peers if peer not in left_out}
    rounds = 1 if arguments.quick else arguments.rounds
    whole = not arguments.quick and set(arguments.only) == set(NAMES) and set(arguments.peers) == set(PEERS)
    path = arguments.json or (LATEST if whole else LATEST.with_name("partial-peers.json"))

    with tempfile.TemporaryDirectory(prefix="trb", dir="/tmp" if os.path.isdir("/tmp") else None) as directory:
        bench = Bench(arguments.only, peers, rounds, arguments.quick, Path(directory))
        asyncio.run(bench.run())
    result = bench.write(
        path,
        rounds=rounds,
        quick=arguments.quick,
        sizes={name: dict(WORK[name].sizes) for name in arguments.only if name in WORK},
        starts={name: STARTS[name] for name in arguments.only if name in STARTS},
        versions={peer: versions(FOREIGN[peer].environment) for peer in peers if peer in FOREIGN},
        left_out=left_out,
    )
    print(f"\n{render_foreign(result)}")
    draw_if_possible(path)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
