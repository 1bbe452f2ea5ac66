"""Pools of workers for prefill and decode beside workers that do both, in virtual time.

    python -m benchmarks.llm.pools DIRECTORY [--jobs 2]

DIRECTORY has Mooncake's `conversation_trace.jsonl`. Each load is for eight workers: all do both, or 2, 3 or 4 of them
compute prompts for the others. The mixed loads follow from a seed. They are chats with long answers, which go on in
turns, and documents with short ones. It writes results/pools.json; the table is in docs/llm/replay.md.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.rounds import RESULTS
from triton_distributed.llm.replay import Trace, TraceRequest, read_trace, simulate

WORKERS = 8
SPLITS = (0, 2, 3, 4)
"""Prefill workers; 0 for none."""

REQUESTS = 4000
BLOCK = 512


class Length(NamedTuple):
    """A log-normal distribution of tokens: its median, the deviation of the logarithm, and its limits."""

    median: int
    deviation: float
    least: int
    most: int

    def drawn(self, rng: random.Random) -> int:
        """A length."""
        return round(min(self.most, max(self.least, self.median * math.exp(rng.gauss(0, self.deviation)))))


class Mix(NamedTuple):
    """A mixed load: the part of the requests that are documents, and the lengths of both kinds."""

    documents: float
    turn: Length
    answer: Length
    document: Length = Length(13_000, 0.5, 4000, 60_000)
    summary: Length = Length(200, 0.5, 10, 1000)


FEW = Mix(0.06, Length(300, 0.6, 30, 4000), Length(700, 0.6, 10, 3000))
MANY = Mix(0.12, Length(600, 0.6, 30, 4000), Length(350, 0.7, 10, 3000))

MIXES = {"few documents": FEW, "many documents": MANY}

LOADS = (
    *(("few documents", each) for each in (20.0, 40.0, 60.0)),
    *(("many documents", each) for each in (30.0, 50.0)),
    *(("conversation", each) for each in (2.0, 4.0, 6.0)),
)
"""Names, and requests a second of the mixed loads, or how many times faster than in the trace."""


def mixed(mix: Mix, rate: float, requests: int = REQUESTS, seed: int = 1) -> Trace:
    """Chats that go on in turns beside documents. Three of five turns belong to one of the last 200 chats."""
    return Trace(_mixed(mix, rate, requests, random.Random(seed)), block_tokens=BLOCK, name="mixed")


def _mixed(mix: Mix, rate: float, requests: int, rng: random.Random) -> Iterator[TraceRequest]:
    at_s, fresh = 0.0, 0
    chats: list[tuple[tuple[int, ...], int]] = []
    for _ in range(requests):
        at_s += rng.expovariate(rate)
        before: tuple[int, ...] = ()
        if rng.random() < mix.documents:
            tokens, answer = mix.document.drawn(rng), mix.summary.drawn(rng)
            chat = False
        else:
            tokens, answer = mix.turn.drawn(rng), mix.answer.drawn(rng)
            chat = True
            if chats and rng.random() < 0.6:
                before, earlier = chats.pop(rng.randrange(len(chats)))
                before = before[: earlier // BLOCK]
                tokens += earlier
        count = -(-tokens // BLOCK) - len(before)
        blocks = (*before, *range(fresh, fresh + count))
        fresh += count
        if chat and tokens < 12_000:
            chats.append((blocks, tokens))
            del chats[:-200]
        yield TraceRequest(at_s=at_s, prompt_tokens=tokens, answer_tokens=answer, blocks=blocks)


class Cell(NamedTuple):
    """What came of one load: seconds, and the parts of prompts that were cached and that were computed elsewhere."""

    ttft_s: float
    ttft_p99_s: float
    itl_s: float
    itl_p99_s: float
    e2e_s: float
    hit_rate: float
    elsewhere: float
    prefill_busy: float


def measured(directory: Path, load: tuple[str, float], prefill: int) -> Cell:
    """Replay one load with so many prefill workers."""
    name, rate = load
    if name == "conversation":
        trace, speed = read_trace(directory / "conversation_trace.jsonl"), rate
    else:
        trace, speed = mixed(MIXES[name], rate), 1.0
    report = simulate(trace, "kv", workers=WORKERS, prefill=prefill, speed=speed)
    pool = report.pools[0]
    return Cell(
        report.ttft_s.mean,
        report.ttft_s.p99,
        report.itl_s.mean,
        report.itl_s.p99,
        report.e2e_s.mean,
        report.hit_rate,
        pool.prompts / len(report.requests) if prefill else 0.0,
        pool.busy if prefill else 0.0,
    )


def table(cells: dict[str, dict[str, float]]) -> list[str]:
    """The lines of the table, from the cells by `load rate prefill`."""
    lines = [
        "| load | prefill + decode | first token, mean | p99 | between tokens, mean | p99 | whole answer | elsewhere |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, rate in LOADS:
        what = f"{name} × {rate:g}" if name == "conversation" else f"{name}, {rate:g}/s"
        both = cells[f"{name} {rate:g} 0"]
        for prefill in SPLITS:
            cell = cells[f"{name} {rate:g} {prefill}"]
            pools = f"{prefill} + {WORKERS - prefill}" if prefill else f"{WORKERS} do both"
            times = [f"{1000 * cell['ttft_s']:.0f} ms", f"{cell['ttft_p99_s']:.2f} s"]
            gaps = [f"{1000 * cell['itl_s']:.1f} ms", f"{1000 * cell['itl_p99_s']:.0f} ms"]
            if prefill:
                times[0] += f" ({cell['ttft_s'] / both['ttft_s'] - 1:+.0%})"
                gaps[1] += f" ({cell['itl_p99_s'] / both['itl_p99_s'] - 1:+.0%})"
            columns = [what, pools, *times, *gaps, f"{cell['e2e_s']:.1f} s", f"{cell['elsewhere']:.0%}"]
            lines.append(f"| {' | '.join(columns)} |")
    return lines


def main() -> None:
    """Replay all loads, print the table, and write the result."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", metavar="DIRECTORY", type=Path, help="where the trace is")
    parser.add_argument("--jobs", metavar="N", type=int, default=2, help="processes (default: 2)")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.jobs) as pool:
        found = {
            f"{load[0]} {load[1]:g} {prefill}": pool.submit(measured, arguments.directory, load, prefill)
            for load in LOADS
            for prefill in SPLITS
        }
        cells = {key: each.result()._asdict() for key, each in found.items()}
    print("\n".join(table(cells)))
    (RESULTS / "pools.json").write_text(json.dumps({"requests": REQUESTS, "cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
