"""The result of a soak as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.report import place

MIB = 1 << 20


def _process(name: str, history: Mapping[str, Any], memory: Mapping[str, int], warm_up_s: float) -> str:
    quiet = [each for each in history["quiet"] if each["at"] >= warm_up_s]

    def through(what: str) -> str:
        values = sorted({each[what] for each in quiet})
        return "–" if not values else f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"

    gained = resident = "–"
    if memory:
        resident = f"{memory['first'] / MIB:.1f} → {memory['last'] / MIB:.1f}"
        gained = f"{(memory['last'] - memory['first']) / MIB:+.2f} / {memory['fitted'] / MIB:+.2f}"
        gained += f" ({memory['allowed'] / MIB:.1f})"
    objects = f"{quiet[0]['objects']:,} → {quiet[-1]['objects']:,}" if quiet else "–"
    allocated = f"{quiet[0]['allocated'] / MIB:.2f} → {quiet[-1]['allocated'] / MIB:.2f}" if quiet else "–"
    counted = (through(what) for what in ("descriptors", "tasks", "threads"))
    cells = (name, resident, gained, allocated, objects, *counted)
    return f"| {' | '.join(cells)} |"


def _kind(name: str, counts: Mapping[str, int]) -> str:
    ends = ", ".join(f"{how} {count:,}" for how, count in sorted(counts.items(), key=lambda each: -each[1]))
    return f"| {name.replace('_', ' ')} | {sum(counts.values()):,} | {ends} |"


def render(result: Mapping[str, Any]) -> str:
    """The figures of a run."""
    lines = [
        "| process | resident, MiB | gained (allowed) | malloc, MiB | objects | descriptors | tasks | threads |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(
            _process(name, result["processes"][name], figures, result["warm_up_s"])
            for name, figures in result["memory"].items()
        ),
        "",
        "| calls | number | how they ended |",
        "| --- | ---: | --- |",
        *(_kind(name, counts) for name, counts in result["outcomes"].items()),
        "",
    ]
    faults = ", ".join(f"{count} × {what}" for what, count in result["faults"].items()) or "none"
    drains = result["drain_s"]
    drained = (
        f" Asked to end, a worker took {drains['median']:.1f} s (longest {drains['longest']:.1f} s)." if drains else ""
    )
    lines.append(
        f"{'Failed' if result['wrong'] else 'Passed'}: `{result['command']}`, {result['seconds']:.0f} s in all, "
        f"{sum(sum(each.values()) for each in result['outcomes'].values()):,} calls. Faults: {faults}.{drained} "
        f"{place(result)}."
    )
    return "\n".join(lines)
