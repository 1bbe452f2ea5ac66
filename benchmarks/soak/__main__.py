"""`python -m benchmarks.soak`: ends with status 1 where anything was wrong or has grown."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path

from benchmarks.processes import environment_without_settings
from benchmarks.soak.run import soak
from benchmarks.soak.stage import Options
from benchmarks.soak.table import PAGE, RESULT, render, written


def main() -> int:
    defaults = Options()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description="Minutes of mixed load, and what stays"
    )
    parser.add_argument("--minutes", type=float, default=defaults.seconds / 60, help="of load (10)")
    parser.add_argument("--rate", type=float, default=defaults.rate, help="calls a second of each of two clients (60)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the mix and of the faults (1)")
    parser.add_argument(
        "--plane", choices=("direct", "nats"), default=defaults.plane, help="how requests travel (direct)"
    )
    parser.add_argument(
        "--discovery", choices=("file", "etcd"), default=defaults.discovery, help="how workers are found (file)"
    )
    parser.add_argument("--trace", action="store_true", help="tell where memory that was gained was allocated; slow")
    parser.add_argument("--output", type=Path, help="write the result there; results/soak.json also renews the README")
    arguments = parser.parse_args()
    if not (arguments.minutes > 0 and arguments.rate > 0):
        parser.error("--minutes and --rate are above 0")
    names = ("rate", "seed", "plane", "discovery", "trace")
    options = Options(seconds=arguments.minutes * 60, **{name: getattr(arguments, name) for name in names})
    for name in set(os.environ) - set(environment_without_settings()):
        if not name.endswith("_BIN"):
            del os.environ[name]
    command = " ".join(["python -m benchmarks.soak", *sys.argv[1:]])
    result = asyncio.run(soak(options, command, lambda line: print(line, flush=True)))
    print(render(result))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
        if arguments.output.resolve() == RESULT and not result["wrong"]:
            PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")
    for name, history in result["processes"].items():
        for each in history["growths"]["traced"]:
            print(f"\n{name}: {each}")
    for each in result["wrong"]:
        print(f"WRONG: {each}", file=sys.stderr)
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
