"""Reads a metrics page as Prometheus does."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families


class Read:
    """The lines of a page by name and labels.

    Args:
        text: the page in Prometheus' text format.
    """

    def __init__(self, text: str) -> None:
        self.families = {each.name: each for each in text_string_to_metric_families(text)}
        self.lines = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        """The value of the one line with this name and exactly these labels."""
        return self.lines[name, frozenset(labels.items())]

    def all(self, name: str, **labels: str) -> list[dict[str, str]]:
        """The labels of each line with this name that has at least these."""
        return [dict(found) for each, found in self.lines if each == name and found >= labels.items()]

    def outcomes(self, name: str, **labels: str) -> dict[str, int]:
        """The counts above 0 by outcome."""
        counts = {each["outcome"]: int(self(name, **each)) for each in self.all(name, **labels)}
        return {outcome: count for outcome, count in counts.items() if count}

    def quantile(self, name: str, q: float, **labels: str) -> tuple[float, float]:
        """The bounds of the bucket in which a quantile of a histogram lies."""
        bounds = sorted(float(each["le"]) for each in self.all(f"{name}_bucket", **labels))
        below = 0.0
        for bound in bounds:
            le = "+Inf" if bound == float("inf") else str(bound)
            if self(f"{name}_bucket", le=le, **labels) >= q * self(f"{name}_count", **labels):
                return below, bound
            below = bound
        raise AssertionError(f"{name} has no bucket without a bound")
