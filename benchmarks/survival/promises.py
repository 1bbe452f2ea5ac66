"""What a phase found: figures, and promises with whether they were kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Found:
    """The result of one phase over one kind of connection.

    Attributes:
        figures: by name.
        promises: (what is promised, whether it was kept, what was found).
        words: about what broke them.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    promises: list[tuple[str, bool, str]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def promise(self, text: str, kept: bool, found: str) -> None:
        """Note a promise."""
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
