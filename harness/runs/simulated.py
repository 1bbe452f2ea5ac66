"""`python -m harness.runs.simulated`: simulates many seeds in virtual time, and tells how to repeat a failing one."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from harness.simulated.simulation import Result, Settings, settings_of, simulate
from triton_distributed.testing.chaos.report import Report

MOST_TOLD = 5  # Failing seeds with a command to repeat them. Further ones seldom have another cause.
# The fields of `Settings` that options may set. By default the seed sets them.
OPTIONS: dict[str, tuple[Callable[[str], object], str]] = {
    "workers": (int, "number of workers"),
    "duration_s": (float, "virtual seconds in which calls and faults begin"),
    "calls_per_s": (float, "calls that begin in a virtual second"),
    "faults_per_s": (float, "faults in a virtual second, on average"),
    "longest_s": (float, "virtual seconds of the longest fault"),
    "spare": (int, "workers that are well at every moment"),
    "max_inflight": (int, "max_inflight of each endpoint"),
    "window_bytes": (int, "see TRD_WINDOW_BYTES"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--seeds", type=int, default=1000, help="number of seeds (default: 1000)")
    parser.add_argument("--first", type=int, default=0, help="first seed (default: 0)")
    parser.add_argument("--seed", type=int, help="simulate only this seed")
    parser.add_argument("--trace", action="store_true", help="print each thing that happens; with --seed")
    for name, (kind, words) in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"{words} (default: each seed has its own)")


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate and print the results; return 0 after a good run, 1 with violations, 2 if the options make no sense."""
    parser = argparse.ArgumentParser(prog="python -m harness.runs.simulated", description="Systems in virtual time.")
    configure(parser)
    arguments = parser.parse_args(argv)
    if arguments.trace and arguments.seed is None:
        parser.error("--trace prints thousands of lines a seed: name one with --seed")
    if arguments.seeds < 1:
        parser.error("--seeds is at least 1")
    one = arguments.seed is not None
    seeds = (
        range(arguments.seed, arguments.seed + 1) if one else range(arguments.first, arguments.first + arguments.seeds)
    )
    chosen: dict[str, Any] = {
        name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None
    }
    began = time.monotonic()
    report, failed = together(
        seeds, lambda seed: replace(settings_of(seed), **chosen), print if arguments.trace else None
    )
    took_s = time.monotonic() - began
    print(report.table())
    print(
        f"schedules   {len(seeds):,} in {took_s:.1f} s, {len(seeds) / took_s:.0f} a second; the run's time is virtual"
    )
    options = "".join(f" --{name.replace('_', '-')} {value}" for name, value in chosen.items())
    for seed in failed[:MOST_TOLD]:
        print(f"again       python -m harness.runs.simulated --seed {seed}{options} --trace")
    return 1 if failed else 0


def together(
    seeds: Iterable[int],
    settings: Callable[[int], Settings] = settings_of,
    tell: Callable[[str], object] | None = None,
) -> tuple[Report, list[int]]:
    """Simulate each seed.

    Args:
        seeds: the seeds.
        settings: returns the settings of a seed.
        tell: called with each line of the trace.

    Returns:
        the results of all seeds together, and the seeds that broke a promise.
    """
    report = Report()
    failed: list[int] = []
    gc.freeze()  # Each simulation ends with a collection, which can skip older objects.
    try:
        for seed in seeds:
            result = simulate(seed, settings(seed), tell)
            _add(report, result, seed)
            if result.violations:
                failed.append(seed)
    finally:
        gc.unfreeze()
    return report, failed


def _add(report: Report, result: Result, seed: int) -> None:
    report.faults += result.faults
    report.left_out += result.left_out
    report.outcomes += result.outcomes
    report.worst_gap_s = max(report.worst_gap_s, result.worst_gap_s)
    report.worst_call_s = max(report.worst_call_s, result.worst_call_s)
    report.seconds += result.seconds
    report.violations += [f"seed {seed}: {each}" for each in result.violations]


if __name__ == "__main__":
    sys.exit(main())
