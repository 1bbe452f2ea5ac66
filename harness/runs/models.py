"""`python -m harness.runs.models` (`make models`): clients, workers and models that go; 1 for a broken promise."""

from __future__ import annotations

import argparse
import asyncio
import json
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


def table(phase: str, result: dict[str, Any]) -> str:
    """Return the figures and the promises of a phase as text."""
    lines = []
    for name, value in result["figures"].items():
        lines.append(f"{phase}: {name}: {_figures(value) if isinstance(value, dict) else _figure(value)}")
    lines += [
        f"{phase}: {each['promise']}: {'kept' if each['kept'] else 'BROKEN'}, {each['found']}"
        for each in result["promises"]
    ]
    return "\n".join(lines)


def _figures(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_figure(value)}" for name, value in values.items())


def _figure(value: Any) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


async def run(phases: list[str], options: argparse.Namespace, path: Path) -> bool:
    """Run phases one after the other, each with its own processes. Return whether all promises were kept."""
    chosen = {name: value for name, value in vars(options).items() if name not in ("json", "phases")}
    well = True
    for phase in phases:
        setting = Setting()
        async with plane("unix") as (_, settings):
            found = await PHASES[phase](settings, options)
        result = {**setting.as_json(), "options": chosen, **found.as_json()}
        kept = json.loads(path.read_text()) if path.exists() else {}
        save({each: kept[each] for each in PHASES if each in kept} | {phase: result}, path)
        print("\n".join([table(phase, result), place(result), *found.words]), end="\n\n", flush=True)
        well = well and not found.broken
    return well


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
    parser.add_argument("--json", type=Path, default=RESULT, help="result file: the phases that run are replaced in it")
    options = parser.parse_args()
    phases = options.phases or list(PHASES)
    if unknown := sorted(set(phases) - set(PHASES)):
        parser.error(f"{', '.join(unknown)}: phases are {', '.join(PHASES)}")
    well = asyncio.run(run(phases, options, options.json))
    print(f"written to {options.json}")
    return 0 if well else 1


if __name__ == "__main__":
    raise SystemExit(main())
