"""What every benchmark shares: rounds in which the peers take turns, medians with their spread, and the result file.

A result file is JSON with these keys:

- `started` (UTC), `took_s`, `machine` (`harness.machine.describe`), `load_before_and_after` (load averages),
- `method`: `rounds`, `quick`, and the sizes of this benchmark,
- `rounds`: workload → peer → one dict of figures for each round, or `{"error": text}`. The name of a figure ends with
  its unit: `p50_us`, `cpu_us`, `per_s`, `gb_per_s`, `peak_mib`, `worker_bytes`,
- `figures`: workload → peer → figure → [median, lowest, highest] of the rounds,
- `ratios`: workload → `ours ÷ PEER` → figure → [median, lowest, highest] of the rounds' own ratios. A peer over TCP
  (its name ends with ` tcp`) is compared with `ours tcp`,
- `failures`: texts; empty if everything was measured.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.machine import describe
from harness.processes import ChildFailed

RESULTS = Path(__file__).resolve().parent / "results"
OURS = ("ours", "ours-compiled")
TCP = " tcp"  # The end of the name of a peer that uses TCP on the loopback instead of a Unix socket.

Figures = dict[str, float]
Measure = Callable[[], Awaitable[Figures]]
Rounds = dict[str, dict[str, list[dict[str, Any]]]]
Spread = list[float]
"""The median, the lowest and the highest value."""


def spread(values: Iterable[float]) -> Spread:
    """Return the median, the lowest and the highest of the values."""
    ordered = sorted(values)
    return [statistics.median(ordered), ordered[0], ordered[-1]]


def ratio(rounds: Rounds, workload: str, peer: str, other: str, figure: str) -> Spread | None:
    """Return the spread of `peer ÷ other`, round by round; None if no round has both figures.

    A slow minute of the machine affects both figures of a round, so the median of the rounds' own ratios is steadier
    than the quotient of two medians.
    """
    peers = rounds.get(workload, {})
    pairs = zip(peers.get(peer, ()), peers.get(other, ()), strict=False)
    each = [a[figure] / b[figure] for a, b in pairs if figure in a and b.get(figure)]
    return spread(each) if each else None


def summarise(rounds: Rounds) -> dict[str, Any]:
    """Return `figures` and `ratios` of a result file."""
    figures: dict[str, dict[str, dict[str, Spread]]] = {}
    ratios: dict[str, dict[str, dict[str, Spread]]] = {}
    for workload, peers in rounds.items():
        for peer, taken in peers.items():
            good = [each for each in taken if "error" not in each]
            names = dict.fromkeys(name for each in good for name in each)
            figures.setdefault(workload, {})[peer] = {n: spread(f[n] for f in good if n in f) for n in names}
        for peer, other in itertools.product(peers, peers):
            if peer == other or peer.removesuffix(TCP) not in OURS or other.endswith(TCP) is not peer.endswith(TCP):
                continue
            shared = figures[workload][peer]
            found = {name: each for name in shared if (each := ratio(rounds, workload, peer, other, name))}
            if found:
                ratios.setdefault(workload, {})[f"{peer} ÷ {other}"] = found
    return {"figures": figures, "ratios": ratios}


class Run:
    """One run of a benchmark.

    Attributes:
        rounds: the figures so far.
        failures: the texts of what could not be measured.
    """

    def __init__(self) -> None:
        self.rounds: Rounds = {}
        self.failures: list[str] = []
        self._started, self._load = time.time(), os.getloadavg()[0]

    async def interleave(self, number: int, measures: Mapping[tuple[str, str], Measure]) -> None:
        """Take every (workload, peer) once in each of `number` rounds, a workload with all its peers before the next.

        Each round begins with another peer, so that none always follows the same one.
        """
        peers_of: dict[str, list[str]] = {}
        for workload, peer in measures:
            peers_of.setdefault(workload, []).append(peer)
        for done in range(number):
            print(f"round {done + 1} of {number}", flush=True)
            for workload, peers in peers_of.items():
                for peer in rotated(peers, done):
                    await self.take(workload, peer, measures[workload, peer])

    async def take(self, workload: str, peer: str, measure: Measure) -> None:
        """Measure once, print and keep the figures. A `ChildFailed` becomes the round's error and a failure."""
        try:
            figures = await measure()
        except ChildFailed as error:
            self.fail(workload, peer, error)
            return
        shown = "  ".join(f"{key} {value:,.4g}" for key, value in figures.items())
        print(f"  {workload:12} {peer:16} {shown}", flush=True)
        self._keep(workload, peer, figures)

    def fail(self, workload: str, peer: str, error: ChildFailed) -> None:
        """Note that the measurement failed, as the figures of this round."""
        self.failures.append(f"{workload}, {peer}: {error}")
        print(f"  {workload:12} {peer:16} FAILED: {error}", flush=True)
        self._keep(workload, peer, {"error": str(error)})

    def _keep(self, workload: str, peer: str, figures: dict[str, Any]) -> None:
        # A failed round is kept too, so that the rounds of all peers stay in step.
        self.rounds.setdefault(workload, {}).setdefault(peer, []).append(figures)

    def write(self, path: Path, *, rounds: int, quick: bool, **sizes: Any) -> dict[str, Any]:
        """Write the result file and return its content. Print its path and the failures.

        Args:
            rounds: the number of rounds.
            quick: whether the sizes were too small for figures that mean something.
            sizes: what else `method` says.
        """
        result = {
            "started": datetime.fromtimestamp(self._started, UTC).isoformat(timespec="seconds"),
            "took_s": round(time.time() - self._started, 1),
            "machine": describe(),
            "load_before_and_after": [self._load, os.getloadavg()[0]],
            "method": {"rounds": rounds, "quick": quick, **sizes},
            "rounds": self.rounds,
            **summarise(self.rounds),
            "failures": self.failures,
        }
        write_result(path, result)
        print(f"written to {path}")
        for failure in self.failures:
            print(f"FAILED: {failure}")
        return result


def rotated(names: list[str], by: int) -> list[str]:
    """Return the names, beginning with another one for each `by`."""
    by %= max(len(names), 1)
    return names[by:] + names[:by]


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_result(path: Path) -> dict[str, Any]:
    """Return the content of a result file."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result
