"""The policy `kv` beside others over many settings, in virtual time. The table goes into decision 9.

    python -m benchmarks.llm.policies DIRECTORY [--requests 2000] [--jobs 2]

DIRECTORY has `conversation_trace.jsonl` and `synthetic_trace.jsonl` of Mooncake (kvcache-ai/Mooncake, FAST25-release).
Requests that do not fit in nine tenths of an engine's cache are left out. Without reuse, each block is unique.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from triton_distributed.llm.replay import Trace, TraceRequest, read_trace, simulate

POLICIES = ("kv", "kv_linear", "least_loaded", "p2c")

BLOCKS = 16_384
"""Blocks of 64 tokens in the cache of Dynamo's mocker: 100 %."""


class Setting(NamedTuple):
    """A row of the table: a trace, the workers, how fast it comes, the cache in percent, and whether blocks recur."""

    trace: str
    workers: int
    speed: float
    cache: int = 100
    reuse: bool = True


C, S = "conversation", "synthetic"

SETTINGS = (
    *(Setting(C, *each) for each in ((1, 1), (2, 1), (2, 2), (4, 2), (4, 3), (8, 1), (8, 4), (8, 6), (8, 8), (16, 8))),
    *(Setting(C, *each) for each in ((8, 4, 10), (8, 4, 25), (8, 6, 50), (8, 6, 200), (8, 8, 200))),
    *(Setting(C, *each, reuse=False) for each in ((4, 2), (8, 4), (8, 6), (8, 8))),
    *(Setting(S, *each) for each in ((1, 1), (4, 3), (8, 4), (8, 6), (8, 6, 20), (16, 8))),
    Setting(S, 8, 8, reuse=False),
)


class Cell(NamedTuple):
    """What one policy reached: seconds to the first token, the mean of whole answers, the hit rate, and CPU seconds."""

    mean_s: float
    p99_s: float
    answer_s: float
    hit_rate: float
    cpu_s: float


def requests_of(trace: Trace, setting: Setting, most: int) -> Trace:
    """The requests of a setting, of which there are at most `most`."""
    size = BLOCKS * setting.cache // 100 * 64
    fit = [each for each in trace.requests if each.prompt_tokens + each.answer_tokens < 0.9 * size][:most]
    if not setting.reuse:
        number = 0
        unique = []
        for each in fit:
            count = len(each.blocks)
            unique.append(
                TraceRequest(
                    at_s=each.at_s,
                    prompt_tokens=each.prompt_tokens,
                    answer_tokens=each.answer_tokens,
                    blocks=tuple(range(number, number + count)),
                )
            )
            number += count
        fit = unique
    return Trace(fit, block_tokens=trace.block_tokens, name=trace.name)


def measured(directory: Path, setting: Setting, policy: str, most: int) -> Cell:
    """Replay one setting with one policy."""
    trace = requests_of(read_trace(directory / f"{setting.trace}_trace.jsonl"), setting, most)
    began = time.process_time()
    report = simulate(
        trace,
        policy,
        workers=setting.workers,
        speed=setting.speed,
        blocks=BLOCKS * setting.cache // 100,
        seed=1,
    )
    ttft = report.ttft_s
    return Cell(ttft.mean, ttft.p99, report.e2e_s.mean, report.hit_rate, time.process_time() - began)


def row(setting: Setting, cells: Sequence[Cell]) -> str:
    """A row of the table."""
    kv, others = cells[0], cells[1:]
    name = f"{setting.trace}{'' if setting.reuse else ', no reuse'}"
    shares = [
        f"{getattr(kv, each) / min(getattr(other, each) for other in others):.2f}"
        for each in ("mean_s", "p99_s", "answer_s")
    ]
    means = [f"{each.mean_s:.2f}" for each in cells]
    columns = [name, setting.workers, f"{setting.speed:g}", f"{setting.cache} %", *means, *shares]
    return f"| {' | '.join(map(str, columns))} |"


def main() -> int:
    """Replay all settings, and print the table. Returns 1 if a mean is more than 5 % above the best of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the traces are")
    parser.add_argument("--requests", type=int, default=2000, help="the first so many of each trace")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args()
    print("| trace | workers | × | cache | " + " | ".join(POLICIES) + " | mean | p99 | answer |")
    print("|" + " --- |" * (7 + len(POLICIES)))
    worse = 0
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = [
            [pool.submit(measured, options.directory, setting, policy, options.requests) for policy in POLICIES]
            for setting in SETTINGS
        ]
        for setting, futures in zip(SETTINGS, rows, strict=True):
            cells = [each.result() for each in futures]
            worse += cells[0].mean_s > 1.05 * min(each.mean_s for each in cells[1:])
            print(row(setting, cells), flush=True)
    print(f"{len(SETTINGS)} settings, {worse} of them more than 5 % worse than the best of the others", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
