"""The labels that a program adds to the metrics of an endpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

Labels = tuple[tuple[str, str], ...]

MOST_LABELS = 8
"""The most labels of an endpoint. Each adds to all of its lines, about 100."""

MOST_CHARACTERS = 128
"""The most characters of a label's value. Each line of the endpoint repeats it."""

MOST_SETS = 16
"""The most different labels under which one process serves an endpoint, one after the other: their counters stay."""

RESERVED = frozenset(
    [
        "backend",
        "build",
        "direction",
        "endpoint",
        "exported_replica",
        "instance",
        "instance_id",
        "job",
        "le",
        "namespace",
        "outcome",
        "pod",
        "quantile",
        "replica",
        "role",
        "state",
        "version",
    ]
)
"""Labels that the runtime, the supervisor or Prometheus itself sets; `namespace` and `pod` are those of Kubernetes."""

_NAME = r"[a-zA-Z_][a-zA-Z0-9_]*"


def checked_labels(given: Mapping[str, str] | Iterable[tuple[str, str]] | None) -> Labels:
    """The labels of an endpoint, in the order of their names.

    Args:
        given: names and values, as a mapping or as pairs; None for none.

    Raises:
        TypeError: it is neither a mapping nor pairs, or a name or a value is not text.
        ValueError: there are too many labels, a name is given twice, reserved or invalid, or a value is too long.
    """
    pairs = _pairs(given)
    if len(pairs) > MOST_LABELS:
        raise ValueError(f"metrics_labels: {len(pairs)} labels, the limit is {MOST_LABELS}")
    for name, value in pairs:
        _check(name, value)
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError(f"metrics_labels={given!r}: a name is given twice")
    return tuple(sorted(pairs))


def _pairs(given: Any) -> list[tuple[Any, Any]]:
    if given is None:
        return []
    try:
        if isinstance(given, str | bytes):
            raise TypeError
        pairs = [(name, value) for name, value in (given.items() if isinstance(given, Mapping) else given)]
    except (TypeError, ValueError):
        words = 'must be names with values, e.g. {"model": "llama"} or [("model", "llama")]'
        raise TypeError(f"metrics_labels={given!r}: {words}") from None
    return pairs


def _check(name: Any, value: Any) -> None:
    if not isinstance(name, str) or not isinstance(value, str):
        raise TypeError(f"metrics_labels: {name!r}={value!r}: the name and the value of a label must be text")
    if name in RESERVED:
        raise ValueError(f"metrics_labels: {name!r}: this label is the runtime's or Prometheus' own")
    if not re.fullmatch(_NAME, name) or name.startswith("__"):
        raise ValueError(f"metrics_labels: {name!r}: must be letters, digits and underscores, with a letter first")
    if not value or len(value) > MOST_CHARACTERS:
        raise ValueError(
            f"metrics_labels: {name}={value[:40]!r}: must have 1 to {MOST_CHARACTERS} characters, not {len(value)}"
        )
    if not value.isprintable():
        raise ValueError(f"metrics_labels: {name}={value!r}: must be printable")
