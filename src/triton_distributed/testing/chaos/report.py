"""What a chaos run found, and the table that tells it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from triton_distributed.testing.chaos.schedule import FaultKind

MOST_SHOWN = 20  # Violations in a table. Further ones mostly have the same causes.


@dataclass(slots=True)
class Report:
    """What a run did and found.

    Attributes:
        faults: how many were done, by kind.
        left_out: faults that were not done, because too few workers were well.
        outcomes: requests by how they ended; empty where the oracle was not asked.
        worst_gap_s: the longest time without an answer, seconds.
        worst_call_s: the longest that a call took which was answered, seconds.
        seconds: of the whole run.
        violations: what must not be, in words; empty after a good run.
    """

    faults: Counter[FaultKind] = field(default_factory=Counter)
    left_out: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    worst_gap_s: float = 0.0
    worst_call_s: float = 0.0
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Return a text of a few lines, the violations last."""
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
