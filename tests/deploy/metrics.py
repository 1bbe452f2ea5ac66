"""The names of the runtime's metrics, and those that a file under `deploy/` uses."""

from __future__ import annotations

import re

from tests.guards.tree import ROOT

NAME = re.compile(r"\btriton_[a-z_]+")
SUFFIXES = re.compile(r"_(bucket|sum|count)$")
OTHERS = {"up", "process_start_time_seconds", "process_open_fds", "process_max_fds", "process_resident_memory_bytes"}
"""What Prometheus itself and prometheus-client count."""


def documented() -> set[str]:
    """The names in the reference of the metrics, else in the table of the decision."""
    page = ROOT / "docs" / "metrics.md"
    if not page.exists():
        page = ROOT / "docs" / "decisions" / "0007-operate.md"
    return set(NAME.findall(" ".join(re.findall(r"`([^`]+)`", page.read_text(encoding="utf-8")))))


def used(expression: str) -> set[str]:
    """The metrics of the runtime in a PromQL expression; a histogram's parts count as the histogram."""
    return {SUFFIXES.sub("", each) for each in NAME.findall(re.sub(r'"[^"]*"', "", expression))}
