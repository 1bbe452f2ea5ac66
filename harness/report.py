"""The results of runs: figures, kept and broken promises, result files, and the pages that show them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.machine import describe

PAGE = Path(__file__).with_name("README.md")
RESULTS = Path(__file__).with_name("results")


@dataclass
class Found:
    """The result of one run over one kind of connection.

    Attributes:
        figures: the figures by name.
        promises: tuples of the promise, whether it was kept, and what was found.
        words: descriptions of what broke the promises.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    promises: list[tuple[str, bool, str]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def promise(self, text: str, kept: bool, found: str) -> None:
        """Add a promise and whether it was kept."""
        self.promises.append((text, kept, found))

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept."""
        return [f"{text}: {found}" for text, kept, found in self.promises if not kept]

    def as_json(self) -> dict[str, Any]:
        """For the result file."""
        names = ("promise", "kept", "found")
        return {
            "figures": self.figures,
            "promises": [dict(zip(names, each, strict=True)) for each in self.promises],
            "words": self.words,
        }


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that is at least as large as `share` of the values; 0 without values."""
    if not values:
        return 0.0
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


class Setting:
    """The time and the machine of a run. Create it before the run."""

    def __init__(self) -> None:
        self._load = os.getloadavg()[0]

    def as_json(self) -> dict[str, Any]:
        """For the result file."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        return {"at": at, "machine": describe(), "load": [self._load, os.getloadavg()[0]]}


def place(result: Mapping[str, Any]) -> str:
    """Describe the machine of a result and how busy it was."""
    machine, (before, after) = result["machine"], result["load"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, {machine['python']}. "
        f"Load average {before:.1f} before and {after:.1f} after"
    )


def save(result: dict[str, Any], path: Path) -> None:
    """Write a result file."""
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def written(page: str, name: str, text: str) -> str:
    """Return the page with `text` between the marks of a run."""
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    start, rest = page.split(first)
    return f"{start}{first}\n{text}\n{last}{rest.split(last)[1]}"


def renew(name: str, text: str) -> None:
    """Write `text` into the page, between the marks of a run."""
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), name, text), encoding="utf-8")
