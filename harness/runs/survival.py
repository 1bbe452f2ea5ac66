"""`python -m harness.runs.survival` (`make survival`): kill, restart, overload, rotation; 1 for a broken promise."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.fleet import PLANES, plane
from harness.report import RESULTS, Found, Setting, place, renew, save
from harness.runs.kill import Rolling, kill
from harness.runs.overload import overload
from harness.runs.restart import restart
from harness.runs.rotation import rotation
from triton_distributed.testing import ServerMissing

RESULT = RESULTS / "survival.json"
WHOLE_S = 60.0
MOST_FLOOD_S = 60.0  # The flood is one answer of a client process: see ANSWER_TIMEOUT_S.


def _kill(settings: dict[str, str], seconds: float) -> Awaitable[Found]:
    return kill(Rolling(settings), seconds)


def _restart(settings: dict[str, str], seconds: float) -> Awaitable[Found]:
    return restart(Rolling(settings), max(1, round(seconds / 12)))


def _overload(settings: dict[str, str], seconds: float) -> Awaitable[Found]:
    return overload(settings, min(seconds / 2, MOST_FLOOD_S), min(1.0, seconds / 20))


def _rotation(settings: dict[str, str], seconds: float) -> Awaitable[Found]:
    return rotation(settings, max(3, round(seconds / 3)))


# The phases by name. Each is a function of the settings and of the seconds of the rolling kill, and takes its share.
PHASES: dict[str, Callable[[dict[str, str], float], Awaitable[Found]]] = {
    "kill": _kill,
    "restart": _restart,
    "overload": _overload,
    "rotation": _rotation,
}


@dataclass(frozen=True)
class Row:
    """One line of the table: a text, and a format for the figures of one phase."""

    phase: str
    text: str
    shown: str
    needs: str = ""  # A figure that must exist.


ROWS = (
    Row("kill", "workers killed, one each 2 s; calls meanwhile", "{events}; {calls:,}"),
    Row("kill", "cut by it: StreamIncomplete, handler had or may have begun", "{incomplete} ({share:.2%})"),
    Row("kill", "failed in any other way; truncated; wrong items", "{failed}; {truncated}; {wrong}"),
    Row("kill", "idempotent calls, 15 ms of work: p50, p99, longest, ms", "{idempotent_p50_ms:.0f}, "
        "{idempotent_p99_ms:.0f}, {idempotent_max_ms:.0f}"),
    Row("kill", "resumed streams, an item each 5 ms: longest pause, ms", "{resumed_pause_ms:.0f}"),
    Row("kill", "no answer at all at a client: median of kills, longest, usual longest, ms", "{gap_p50_ms:.0f}, "
        "{gap_max_ms:.0f}, {gap_quiet_ms:.0f}"),
    Row("restart", "workers restarted, one after the other; calls meanwhile", "{events}; {calls:,}"),
    Row("restart", "failed; truncated; wrong items", "{failed_all}; {truncated}; {wrong}"),
    Row("restart", "idempotent calls: p50, p99, longest, ms", "{idempotent_p50_ms:.0f}, "
        "{idempotent_p99_ms:.0f}, {idempotent_max_ms:.0f}"),
    Row("restart", "no answer at all at a client: median, longest, usual longest, ms", "{gap_p50_ms:.0f}, "
        "{gap_max_ms:.0f}, {gap_quiet_ms:.0f}"),
    Row("overload", "capacity, computed and measured, calls/s", "{capacity_computed_per_s:,.0f}, "
        "{capacity_measured_per_s:,.0f}"),
    Row("overload", "twice that: answered in time, of the measured capacity", "{goodput_of_measured:.1%}"),
    Row("overload", "let in: p50 and p99, deadline, ms; late", "{p50_ms:.0f}, {p99_ms:.0f}, {timeout_ms:.0f}; "
        "{expired_share:.2%}"),
    Row("overload", "refused; of these with a hint when to come back, median ms", "{twice_refused:,}; "
        "{twice_hints:,}, {hint_p50_ms:.0f}"),
    Row("overload", "sent a second time; the budget allows", "{retries:,}; {retries_allowed:,.0f}"),
    Row("overload", "ten times that: answered in time, of the computed capacity", "{high_goodput_of_computed:.1%}"),
    Row("overload", "usual times again after the load's fall, ms", "{recovery_ms:.0f}", "recovery_ms"),
    Row("overload", "handlers that compute, twice the measured capacity: answered in time; late",
        "{busy_goodput_of_measured:.1%}; {busy_expired_share:.2%}", "busy_capacity_per_s"),
    Row("rotation", "workers killed; clients that watch", "{kills}; {clients}"),
    Row("rotation", "from the reset to the last call that is offered the worker: median, longest, ms",
        "{last_p50_ms:.1f}, {last_max_ms:.1f}", "last_p50_ms"),
    Row("rotation", "… to the first call that is not: median, longest, ms", "{first_p50_ms:.1f}, {first_max_ms:.1f}",
        "first_p50_ms"),
    Row("rotation", "… to the last call that is sent to it: longest, ms", "{sent_max_ms:.1f}", "sent_max_ms"),
)  # fmt: skip


def _shown(row: Row, found: dict[str, Any] | None) -> str:
    if found is None or (row.needs and found["figures"].get(row.needs) is None):
        return "–"
    figures = dict(found["figures"])
    figures["share"] = figures.get("incomplete", 0) / max(1, figures.get("calls", 0))
    figures["failed_all"] = figures.get("failed", 0) + figures.get("incomplete", 0)
    return row.shown.format(**figures)


def table(result: dict[str, Any]) -> str:
    """Return the figures and the promises as Markdown."""
    found = result["found"]
    planes = result["options"]["planes"]
    lines = [f"| | what | {' | '.join(planes)} |", f"| --- | --- |{' ---: |' * len(planes)}"]
    for row in ROWS:
        cells = [_shown(row, found.get(row.phase, {}).get(plane)) for plane in planes]
        if any(cell != "–" for cell in cells):
            lines.append(f"| {row.phase} | {row.text} | {' | '.join(cells)} |")
    lines += ["", "Promises:", ""]
    for phase, by_plane in found.items():
        texts = dict.fromkeys(each["promise"] for of_plane in by_plane.values() for each in of_plane["promises"])
        for text in texts:
            said = [
                f"{plane}: {'kept' if each['kept'] else '**BROKEN**'}, {each['found']}"
                for plane, of_plane in by_plane.items()
                for each in of_plane["promises"]
                if each["promise"] == text
            ]
            lines.append(f"- {phase}: {text} ({'; '.join(said)})")
    lines += ["", f"{place(result)}; {result['options']['seconds']:g} s."]
    return "\n".join(lines)


def _chosen(text: str, known: tuple[str, ...]) -> list[str]:
    names = [each for each in text.split(",") if each]
    if not names or (wrong := set(names) - set(known)):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(wrong)) if names else text!r}: some of {','.join(known)}")
    return names


def _seconds(text: str) -> float:
    value = float(text)
    if not 2 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text}: from 2 to 86400")
    return value


async def run(phases: list[str], planes: list[str], seconds: float) -> dict[str, dict[str, Found]]:
    """Run all phases over all planes, one after the other, each with its own processes."""
    found: dict[str, dict[str, Found]] = {}
    for phase in phases:
        for name in planes:
            async with plane(name) as (_, settings):
                each = found.setdefault(phase, {})[name] = await PHASES[phase](settings, seconds)
            print(f"{phase:9} {name:5} {'; '.join(each.broken) or 'all promises kept'}", flush=True)
            for words in each.words:
                print(f"          {words}", flush=True)
    return found


def main() -> int:
    names = tuple(PHASES)
    parser = argparse.ArgumentParser(prog="python -m harness.runs.survival", description="Kill workers and see")
    parser.add_argument(
        "--only", type=lambda text: _chosen(text, names), default=list(names), help=f"some of {','.join(names)}"
    )
    parser.add_argument(
        "--seconds", type=_seconds, default=WHOLE_S, help="length of the rolling kill; other phases in proportion (60)"
    )
    parser.add_argument(
        "--planes",
        type=lambda text: _chosen(text, tuple(PLANES)),
        default=["unix", "tcp"],
        help=f"some of {','.join(PLANES)} (unix,tcp); etcd is TCP with discovery through etcd",
    )
    parser.add_argument("--json", type=Path, help="result file; a whole run's: harness/results/survival.json")
    arguments = parser.parse_args()
    whole = arguments.only == list(names) and arguments.seconds >= WHOLE_S and {"unix", "tcp"} <= {*arguments.planes}
    path = arguments.json or (RESULT if whole else RESULT.with_name("survival-partial.json"))
    setting = Setting()
    try:
        found = asyncio.run(run(arguments.only, arguments.planes, arguments.seconds))
    except ServerMissing as error:
        parser.error(str(error))
    result = {
        **setting.as_json(),
        "options": {"planes": arguments.planes, "seconds": arguments.seconds},
        "found": {
            phase: {name: each.as_json() for name, each in by_plane.items()} for phase, by_plane in found.items()
        },
    }
    save(result, path)
    if path == RESULT:
        renew("survival", table(result))
    print(f"\n{table(result)}\nwritten to {path}")
    broken = [
        f"BROKEN: {phase}, {name}: {text}"
        for phase, by_plane in found.items()
        for name, each in by_plane.items()
        for text in each.broken
    ]
    print("\n".join(broken))
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
