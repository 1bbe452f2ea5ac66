"""The metrics of the runtime with their labels, and those that an expression under `deploy/` uses."""

from __future__ import annotations

import re

from tests.guards.tree import ROOT

NAME = re.compile(r"\btriton_[a-z_]+")
SUFFIXES = re.compile(r"_(bucket|sum|count)$")
SELECTOR = re.compile(r"\b(triton_[a-z_]+)\{([^}]*)\}")
ADDED = {"job", "instance", "namespace", "pod", "le", "replica"}
"""The labels that Prometheus, its histograms and replicas add."""


def documented() -> dict[str, set[str]]:
    """The metrics in the reference, each with its labels."""
    page = "".join((ROOT / "docs" / each).read_text(encoding="utf-8") for each in ("metrics.md", "llm/front-end.md"))
    found = {
        name: set(re.findall(r"\w+", labels))
        for name, labels in re.findall(r"^\| `(triton_\w+)` \| \w+ \|([^|]*)\|", page, re.MULTILINE)
    }
    others = re.findall(r"`(triton_[a-z_]+)`", re.sub(r"```.*?```", "", page, flags=re.DOTALL))
    return {**{name: set() for name in others}, **found}


def used(expression: str) -> set[str]:
    """The metrics of the runtime in a PromQL expression; a histogram's parts count as the histogram."""
    return {SUFFIXES.sub("", each) for each in NAME.findall(re.sub(r'"[^"]*"', "", expression))}


def unknown(expression: str) -> list[str]:
    """The metrics of a PromQL expression that the runtime does not have, and their labels that it does not set."""
    known = documented()
    found = sorted(used(expression) - set(known))
    for name, inside in SELECTOR.findall(expression):
        labels = set(re.findall(r"(\w+)\s*(?:=~|!=|=)", re.sub(r'"[^"]*"', '""', inside)))
        extra = labels - ADDED - known.get(SUFFIXES.sub("", name), set())
        found += [f"{name}{{{label}}}" for label in sorted(extra)]
    return found
