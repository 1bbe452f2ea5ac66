"""What the runtime should reach, as data, and whether the committed result files say that it does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from benchmarks.rounds import OURS, RESULTS, Spread, ratio, read_result, spread

PURE, COMPILED = OURS
BEST = ""  # The compiled build where the file has it, else the pure one.
DYNAMO = ("Dynamo", "Dynamo, pushed")
DYNAMO_HTTP = ("Dynamo", "Dynamo, mocker", "Dynamo, HttpService")
ECHO = ("Dynamo, echo",)
PEERS = ("grpc.aio", "nats-py", "SSE", "Ray actor", "Ray Serve")

COMMANDS = {
    "latest.json": "make bench",
    "peers.json": "make bench-peers",
    "instructions.json": "make instructions INSTRUCTIONS_ARGS=--record",
    "bulk.json": "python -m benchmarks.bulk",
    "shared.json": "python -m benchmarks.shared",
    "cores.json": "python -m benchmarks.cores",
    "index.json": "python -m benchmarks.llm.index",
    **{f"llm-{name}.json": f"python -m benchmarks.llm {name}" for name in ("overhead", "chunks", "gaps")},
}
"""The command that makes each result file."""


@dataclass(frozen=True)
class Target:
    """A bound for one figure of one workload.

    Args:
        text: what is bounded.
        file: the result file.
        against: the bound is for the ratio to each of these peers that the file has. If empty, it is for the figure.
        at_least: whether the bound is the least value; else it is the largest.
        peer: which of our builds.
        unit: the unit of the figure, if the bound is for the figure.
        words: how the table names the peers of `against`, if they are several.
    """

    text: str
    file: str
    workload: str
    figure: str
    bound: float
    against: tuple[str, ...] = ()
    at_least: bool = False
    peer: str = BEST
    unit: str = ""
    words: str = ""

    def met(self, value: float) -> bool:
        """Whether a value keeps the bound."""
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        share = Fraction(self.bound).limit_denominator(10)
        amount = str(share) if share.numerator == 1 != share.denominator else f"{self.bound:,.4g}"
        if self.bound >= 1000:
            amount = f"{self.bound:,.0f}"
        bound = f"{'≥' if self.at_least else '≤'} {amount}"
        if not self.against:
            return f"{bound} {self.unit}".rstrip()
        return f"{bound} × {self.words or self.against[0]}"


CALLS, ITEMS, ALONE = "64 concurrent calls", "16 × 500 items", "1 call at a time"
PACED, ARRAY, IDLE = "256 paced streams", "16 MiB array echoed", "10,000 idle streams"
SCRAPED = "metrics of 10,000 open streams: the loop waits"
BULK, BESIDE = "200 MB to each of four workers", "p99 of 1-item calls beside a 1 GiB tensor"
BARE, PACE = "bare uvicorn", "1,000 chat streams of 50 tokens/s"
BETTER, ANY, BEST_HTTP = "Dynamo's better path", "the best peer", "Dynamo's best with an engine"
WHOLE, SINGLE, EVENT = "whole chat answers", "chat streams of one output", "CPU of the HTTP server for an event"
FIND, OPERATIONS = "256 blocks in the index", "block operations/s a core"
TARGETS = (
    Target(
        f"{CALLS}: instructions, compiled",
        "instructions.json",
        "concurrent",
        "instructions",
        1.5,
        ("yardstick",),
        peer=COMPILED,
    ),
    Target(
        f"{CALLS}: instructions, pure Python",
        "instructions.json",
        "concurrent",
        "instructions",
        2.3,
        ("yardstick",),
        peer=PURE,
    ),
    Target(f"{CALLS}: calls/s", "peers.json", "concurrent", "per_s", 15, DYNAMO, at_least=True, words=BETTER),
    Target(f"{CALLS}: calls/s", "peers.json", "concurrent", "per_s", 2.5, ("nats-py",), at_least=True),
    Target(
        f"{ITEMS}: instructions, compiled",
        "instructions.json",
        "streams",
        "instructions",
        1.15,
        ("yardstick",),
        peer=COMPILED,
    ),
    Target(
        f"{ITEMS}: instructions, pure Python",
        "instructions.json",
        "streams",
        "instructions",
        1.5,
        ("yardstick",),
        peer=PURE,
    ),
    Target(f"{ITEMS}: items/s", "peers.json", "streams", "per_s", 35, DYNAMO, at_least=True, words=BETTER),
    Target(f"{ITEMS}: items/s", "peers.json", "streams", "per_s", 7, PEERS, at_least=True, words=ANY),
    Target(f"{ALONE}: p50", "peers.json", "alone", "p50_us", 1 / 2, PEERS, words=ANY),
    Target(f"{ALONE}: p50", "peers.json", "alone", "p50_us", 1 / 6, DYNAMO, words=BETTER),
    Target(f"{ALONE}: p50", "latest.json", "alone", "p50_us", 1.2, ("yardstick",)),
    Target(f"{PACED}: CPU an item", "peers.json", "paced", "cpu_us", 1 / 6, DYNAMO, words=BETTER),
    Target(f"{PACED}: p99 lateness", "peers.json", "paced", "p99_ms", 1 / 4, DYNAMO, words=BETTER),
    Target(
        f"{ARRAY}: GB/s through shared memory",
        "latest.json",
        "array",
        "gb_per_s",
        4,
        ("ours-socket",),
        at_least=True,
        words="our socket",
    ),
    Target(
        f"{ARRAY}: GB/s over the socket",
        "latest.json",
        "array",
        "gb_per_s",
        0.85,
        ("bare",),
        at_least=True,
        words="a bare echo",
        peer="ours-socket",
    ),
    Target(f"{ARRAY}: GB/s", "peers.json", "array", "gb_per_s", 5, PEERS, at_least=True, words=ANY),
    Target(f"{BULK}: time at once", "bulk.json", "fan_out", "at_once_over_in_turn", 1.2, unit="× that in turn"),
    Target(f"{BESIDE}, sent", "bulk.json", "beside", "sent_p99_over_quiet", 2, unit="× that without"),
    Target(f"{BESIDE}, received", "bulk.json", "beside", "received_p99_over_quiet", 2, unit="× that without"),
    Target(f"{IDLE}: worker, bytes each", "latest.json", "idle", "worker_bytes", 3 * 1024),
    Target(f"{IDLE}: client, bytes each", "latest.json", "idle", "client_bytes", 3 * 1024),
    Target(f"{IDLE}: descriptors that they add", "latest.json", "idle", "descriptors", 0),
    Target(SCRAPED, "latest.json", "scrape", "computed_ms", 5, unit="ms"),
    Target(
        "pipeline of three workers: CPU an item", "latest.json", "pipeline", "over_one_stage", 2.2, unit="× one stage's"
    ),
    Target(
        "2 replicas on 2 cores, plain Python: calls/s",
        "cores.json",
        "cpu",
        "per_s",
        1.8,
        ("1",),
        at_least=True,
        peer="2",
        words="one's",
    ),
    Target(f"{WHOLE}: requests/s", "llm-overhead.json", "whole", "per_s", 0.6, ("bare",), at_least=True, words=BARE),
    Target(f"{SINGLE}: requests/s", "llm-overhead.json", "single", "per_s", 0.6, ("bare",), at_least=True, words=BARE),
    Target(f"{WHOLE}: requests/s", "llm-overhead.json", "whole", "per_s", 5, ("LiteLLM",), at_least=True),
    Target(
        f"{WHOLE}: requests/s", "llm-overhead.json", "whole", "per_s", 1, DYNAMO_HTTP, at_least=True, words=BEST_HTTP
    ),
    Target(f"{WHOLE}: requests/s", "llm-overhead.json", "whole", "per_s", 1, ECHO, at_least=True),
    Target(f"{EVENT}, full speed", "llm-chunks.json", "chunks", "front_us", 1, DYNAMO_HTTP, words=BEST_HTTP),
    Target(f"{EVENT}, full speed", "llm-chunks.json", "chunks", "front_us", 1, ECHO),
    Target(f"{EVENT}, paced", "llm-chunks.json", "paced", "front_us", 1, DYNAMO_HTTP, words=BEST_HTTP),
    Target(f"{EVENT}, paced", "llm-chunks.json", "paced", "front_us", 1, ECHO),
    Target(f"{PACE}: p99 gap", "llm-gaps.json", "steps", "p99_over_engine", 2, unit="× the engine's"),
    Target(f"{PACE}: tokens", "llm-gaps.json", "steps", "of_due", 0.99, at_least=True, unit="× those due"),
    Target(f"{FIND}, hot: p50", "index.json", "hot", "p50_us", 10, unit="µs"),
    Target(f"{FIND}, hot: p50", "index.json", "hot", "p50_us", 1, DYNAMO),
    Target(f"{FIND}, cold: p50", "index.json", "cold", "p50_us", 100, unit="µs"),
    *(
        Target(f"{what}: {OPERATIONS}", "index.json", work, "per_s", 1e6, at_least=True)
        for work, what in {
            "store": "index, stored",
            "remove": "index, removed",
            "remove parts": "index, removed in parts",
            "worker: store": "worker, stored",
            "worker: remove": "worker, removed",
            "worker: remove each": "worker, removed one by one",
        }.items()
    ),
    Target("index, bytes a block", "index.json", "memory", "entry_bytes", 200),
    Target("worker, bytes a block", "index.json", "worker: memory", "entry_bytes", 200),
    Target("hello world, both processes' start to first reply", "latest.json", "hello", "both_s", 0.4, unit="s"),
    Target("import triton_distributed.runtime", "latest.json", "import", "import_ms", 100, unit="ms"),
)


@dataclass(frozen=True)
class Outcome:
    """What the result files say about a target.

    Attributes:
        value: the figure, or the ratio to the peer for which it is worst; None if it is not measured.
        peer: that peer, or "".
    """

    target: Target
    value: Spread | None
    peer: str = ""

    @property
    def mark(self) -> str:
        """`met`, `met, not in every round`, `**short**` or `not measured`. The median decides."""
        if self.value is None:
            return "not measured"
        if not self.target.met(self.value[0]):
            return "**short**"
        return "met" if all(map(self.target.met, self.value)) else "met, not in every round"


def outcome(target: Target, result: Mapping[str, Any]) -> Outcome:
    """Compare a target with the content of its result file."""
    rounds = result["rounds"]
    peers = rounds.get(target.workload, {})
    peer = target.peer or (COMPILED if COMPILED in peers else PURE)
    if not target.against:
        taken = [each[target.figure] for each in peers.get(peer, ()) if target.figure in each]
        return Outcome(target, spread(taken) if taken else None)
    ratios = {other: ratio(rounds, target.workload, peer, other, target.figure) for other in target.against}
    found = {other: each for other, each in ratios.items() if each is not None}
    if not found:
        return Outcome(target, None)
    worst = (min if target.at_least else max)(found, key=lambda other: found[other][0])
    return Outcome(target, found[worst], worst)


def outcomes(targets: Iterable[Target] = TARGETS, folder: Path = RESULTS) -> Iterator[Outcome]:
    """Compare the targets with the result files of a folder."""
    results: dict[str, dict[str, Any]] = {}
    for target in targets:
        if target.file not in results:
            path = folder / target.file
            results[target.file] = read_result(path) if path.exists() else {"rounds": {}}
        yield outcome(target, results[target.file])
