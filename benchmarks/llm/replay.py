"""Routing policies beside Dynamo's router on public traces: `python -m benchmarks.llm.replay DIRECTORY`.

DIRECTORY has `conversation_trace.jsonl` and `synthetic_trace.jsonl` of Mooncake (github.com/kvcache-ai/Mooncake, folder
FAST25-release/traces). Our cells come from `triton_distributed.llm.replay`, Dynamo's from its own offline replay. Both
simulate the same engines: the rows with round robin show how equal they are. Dynamo's router is run with its defaults,
with several overlap credits, and with its queue; its best setting is the one with the least mean time to the first
token, found for each cell by itself. It writes results/replay.json, and prints the table of docs/llm/replay.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import environments
from benchmarks.rounds import RESULTS
from harness.machine import describe
from harness.processes import ROOT, environment_without_settings

CELLS = (("conversation", 6), ("conversation", 8), ("synthetic", 4), ("synthetic", 6))
WORKERS = 8
OURS = ("round_robin", "p2c", "least_loaded", "kv_linear", "prefix_hash", "kv")
ROUND_ROBIN = "round_robin"
DEFAULT = "Dynamo, default"
DYNAMO: dict[str, dict[str, Any]] = {
    f"Dynamo, {ROUND_ROBIN}": {},
    DEFAULT: {"overlap_score_credit": 1.0},
    **{f"Dynamo, credit {credit}": {"overlap_score_credit": float(credit)} for credit in (3, 6, 12, 30)},
    **{
        f"Dynamo, credit {credit}, queue {threshold}": {
            "overlap_score_credit": float(credit),
            "router_queue_threshold": float(threshold),
            "router_queue_policy": "wspt",
        }
        for credit in (3, 12)
        for threshold in (1, 4)
    },
}
BEST = "Dynamo, its best"
LIMIT_S = 1800

Figures = dict[str, float]
Cell = dict[str, Figures]


def on_dynamo(trace: Path, speed: int) -> Cell:
    """Dynamo's figures for one cell."""
    environments.make("dynamo")
    lines = "".join(json.dumps(options) + "\n" for options in DYNAMO.values())
    done = subprocess.run(
        [environments.python("dynamo"), "-m", "benchmarks.llm.replay_on_dynamo", str(trace), str(speed), str(WORKERS)],
        input=lines,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment_without_settings(), "DYN_LOG": "error"},
        timeout=LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"Dynamo's replay ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(DYNAMO, found, strict=True))


def on_ours(trace: Path, speed: int) -> Cell:
    """Our figures for one cell, by the command that users have."""
    trd = str(Path(sys.executable).with_name("trd"))
    command = [trd, "replay", str(trace), "--policy", ",".join(OURS)]
    command += ["--workers", str(WORKERS), "--speed", str(speed), "--itl", "1000", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"trd replay ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    found: Cell = {}
    for line in done.stdout.splitlines():
        report = json.loads(line)
        found[report["policy"]] = {
            "mean_s": report["ttft_s"]["mean"],
            "p99_s": report["ttft_s"]["p99"],
            "itl_s": report["itl_s"]["mean"],
            "e2e_s": report["e2e_s"]["mean"],
            "hit_rate": report["hit_rate"],
            "within": report["within"],
            "requests": report["requests"],
        }
    return found


def best(cell: Cell) -> str:
    """Dynamo's setting with the least mean time to the first token."""
    return min((name for name in DYNAMO if name in cell), key=lambda name: cell[name]["mean_s"])


def table(cells: dict[str, Cell]) -> Iterator[str]:
    """The lines of the table."""
    yield "| trace × speed | policy | first token, mean | p99 | within 2 s | cached | between tokens | whole answer |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, cell in cells.items():
        rows = [(each, each) for each in OURS]
        rows += [(each, each) for each in (f"Dynamo, {ROUND_ROBIN}", DEFAULT)]
        chosen = best(cell)
        rows.append((chosen, f"{BEST}: {chosen.removeprefix('Dynamo, ')}"))
        for key, shown in rows:
            of = cell[key]
            share = of["within"] / of["requests"]
            yield (
                f"| {name} | {shown} | {of['mean_s']:.3g} s | {of['p99_s']:.3g} s | {share:.1%} | {of['hit_rate']:.1%} "
                f"| {of['itl_s'] * 1000:.0f} ms | {of['e2e_s']:.3g} s |"
            )


def main() -> None:
    """Run all cells, print the table and write the result."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", metavar="DIRECTORY", type=Path, help="where the traces are")
    folder: Path = parser.parse_args().directory.resolve()
    began, started = time.monotonic(), datetime.now(UTC)
    environments.make("dynamo")

    def cell(name: str, speed: int) -> tuple[str, Cell]:
        trace = folder / f"{name}_trace.jsonl"
        return f"{name} × {speed}", {**on_ours(trace, speed), **on_dynamo(trace, speed)}

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1)) as pool:
        cells = dict(pool.map(lambda each: cell(*each), CELLS))
    result = {
        "started": started.isoformat(timespec="seconds"),
        "took_s": round(time.monotonic() - began),
        "machine": describe(),
        "method": {"workers": WORKERS, "dynamo": environments.versions("dynamo"), "settings": DYNAMO},
        "figures": cells,
    }
    (RESULTS / "replay.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(table(cells)))


if __name__ == "__main__":
    main()
