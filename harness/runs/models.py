"""`python -m harness.runs.models` (`make models`): clients, workers and models that go; 1 for a broken promise."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from harness.fleet import plane
from harness.llm.changes import changes
from harness.llm.disconnects import disconnects
from harness.llm.kills import kills
from harness.llm.soak import soak
from harness.report import RESULTS, Found, Setting, place, save

RESULT = RESULTS / "models.json"

# The phases by name. Each is a function of the settings of all processes and of the options.
PHASES: dict[str, Callable[[dict[str, str], argparse.Namespace], Awaitable[Found]]] = {
    "disconnects": lambda settings, options: disconnects(settings, options.streams, options.seconds),
    "kills": lambda settings, options: kills(settings, options.answers, options.rounds),
    "changes": lambda settings, options: changes(settings, options.cycles),
    "soak": lambda settings, options: soak(settings, options.requests, options.seed),
}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the figures and the promises as text."""
    lines = []
    for phase, each in found.items():
        for name, value in each["figures"].items():
            words = _figures(value) if isinstance(value, dict) else _figure(value)
            lines.append(f"{phase}: {name}: {words}")
        for promise in each["promises"]:
            state = "kept" if promise["kept"] else "BROKEN"
            lines.append(f"{phase}: {promise['promise']}: {state}, {promise['found']}")
    return "\n".join(lines)


def _figures(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_figure(value)}" for name, value in values.items())


def _figure(value: Any) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


async def run(phases: list[str], options: argparse.Namespace) -> dict[str, Found]:
    """Run phases one after the other, each with its own processes."""
    found = {}
    for phase in phases:
        async with plane("unix") as (_, settings):
            found[phase] = each = await PHASES[phase](settings, options)
        print(f"{phase:12} {'; '.join(each.broken) or 'all promises kept'}", flush=True)
        for words in each.words:
            print(f"{'':12} {words}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m harness.runs.models", description="Served models under faults")
    parser.add_argument("phases", nargs="*", metavar="PHASE", help=f"of {', '.join(PHASES)} (default: all)")
    parser.add_argument("--streams", type=int, default=500, help="disconnects: clients of each place and kind (500)")
    parser.add_argument("--seconds", type=float, default=5, help="disconnects: the time over which they leave (5)")
    parser.add_argument("--answers", type=int, default=200, help="kills: answers at once (200)")
    parser.add_argument("--rounds", type=int, default=10, help="kills: rounds, with two kills each (10)")
    parser.add_argument("--cycles", type=int, default=20, help="changes: how often each model comes and goes (20)")
    parser.add_argument("--requests", type=int, default=200_000, help="soak: chats (200,000)")
    parser.add_argument("--seed", type=int, default=1, help="soak: of the chats (1)")
    parser.add_argument("--json", type=Path, help="result file; of a run of all phases: harness/results/models.json")
    options = parser.parse_args()
    phases = options.phases or list(PHASES)
    if unknown := sorted(set(phases) - set(PHASES)):
        parser.error(f"{', '.join(unknown)}: phases are {', '.join(PHASES)}")
    path = options.json or (RESULT if phases == list(PHASES) else RESULT.with_name("models-partial.json"))
    setting = Setting()
    found = {phase: each.as_json() for phase, each in asyncio.run(run(phases, options)).items()}
    chosen = {name: value for name, value in vars(options).items() if name not in ("json", "phases")}
    result = {**setting.as_json(), "options": chosen, "found": found}
    save(result, path)
    print(f"\n{table(found)}\n{place(result)}\nwritten to {path}")
    return 0 if all(promise["kept"] for each in found.values() for promise in each["promises"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
