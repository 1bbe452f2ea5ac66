"""The result of a chaos run, and its table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from triton_distributed.testing.chaos.schedule import FaultKind

MOST_SHOWN = 20  # Most violations in a table. Further ones mostly have the same causes.


@dataclass(slots=True)
class Report:
    """The result of a run.

    Attributes:
        faults: the number of faults that were done, by kind.
        left_out: the number of faults that were skipped because too few workers were well.
        outcomes: the number of requests by outcome; empty if the caller did not record them.
        worst_gap_s: the longest time without an answer, in seconds.
        worst_call_s: the duration of the longest answered call, in seconds.
        seconds: the duration of the whole run, in seconds.
        violations: descriptions of violated promises; empty after a good run.
    """

    faults: Counter[FaultKind] = field(default_factory=Counter)
    left_out: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    worst_gap_s: float = 0.0
    worst_call_s: float = 0.0
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Return the report as a few lines of text, with the violations last."""
        rows = [("faults", f"{self.faults.total()}: {_counts(self.faults)}")]
        if self.left_out:
            rows.append(("left out", f"{self.left_out}, too few workers were well"))
        if self.outcomes:
            rows += [
                ("requests", f"{self.outcomes.total()}: {_counts(self.outcomes)}"),
                ("worst gap", f"{self.worst_gap_s:.2f} s without an answer"),
                ("worst call", f"{self.worst_call_s:.2f} s until its last item"),
            ]
        rows += [
            ("run", f"{self.seconds:.1f} s"),
            ("verdict", f"{len(self.violations)} violations" if self.violations else "good"),
        ]
        lines = [f"{name:<11} {text}" for name, text in rows]
        lines += [f"- {each}" for each in self.violations[:MOST_SHOWN]]
        if len(self.violations) > MOST_SHOWN:
            lines.append(f"- and {len(self.violations) - MOST_SHOWN} more")
        return "\n".join(lines)


def _counts(counter: Counter[FaultKind] | Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common()) or "none"
