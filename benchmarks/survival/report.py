"""The table of a result file, as README.md beside this package shows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parents[1] / "results" / "survival.json"
PAGE = Path(__file__).parents[1] / "README.md"
MARKS = ("<!-- survival -->", "<!-- /survival -->")


@dataclass(frozen=True)
class Row:
    """One line: a text, and a format for the figures of one phase."""

    phase: str
    text: str
    shown: str
    needs: str = ""  # a figure that must be there


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
    """The figures and what was promised, as Markdown."""
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
    machine = result["machine"]
    before, after = result["load"]
    lines += [
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, {machine['python']}. "
        f"Load average {before:.1f} before and {after:.1f} after; {result['options']['seconds']:g} s.",
    ]
    return "\n".join(lines)


def written(page: str, result: dict[str, Any]) -> str:
    """The page with the figures in it."""
    start, rest = page.split(MARKS[0])
    return f"{start}{MARKS[0]}\n{table(result)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"
