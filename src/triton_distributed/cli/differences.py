"""What differs between two values, with the path to each difference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from triton_distributed.cli.rendering import json_line

SHOWN = 60
"""Characters of a value in a difference."""


class Rule:
    """What counts as a difference.

    Args:
        ignored: dotted ends of paths that do not count, with shell wildcards for names: `created`, `usage.*_s`.
        tolerance: numbers may differ by this share of the larger one.
    """

    def __init__(self, ignored: Sequence[str] = (), tolerance: float = 0.0) -> None:
        self._ignored = [each.split(".") for each in ignored]
        self._tolerance = tolerance

    def differences(self, before: Any, now: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
        """Describe each difference of two decoded values, as `path: before → now`."""
        if self._ignores(path):
            return
        if isinstance(before, dict) and isinstance(now, dict):
            for key in dict.fromkeys([*before, *now]):
                inner = (*path, str(key))
                if key not in now or key not in before:
                    if not self._ignores(inner):
                        words = f"{_text(before[key])} → missing" if key in before else f"missing → {_text(now[key])}"
                        yield f"{'.'.join(inner)}: {words}"
                else:
                    yield from self.differences(before[key], now[key], inner)
        elif isinstance(before, list) and isinstance(now, list):
            for number, (one, other) in enumerate(zip(before, now, strict=False)):
                yield from self.differences(one, other, (*path, str(number)))
            if len(before) != len(now):
                yield f"{'.'.join(path) or 'value'}: {len(before)} entries → {len(now)}"
        elif not self._same(before, now):
            yield f"{'.'.join(path) or 'value'}: {_text(before)} → {_text(now)}"

    def _ignores(self, path: tuple[str, ...]) -> bool:
        return any(
            len(path) >= len(names) and all(map(fnmatchcase, path[-len(names) :], names)) for names in self._ignored
        )

    def _same(self, before: Any, now: Any) -> bool:
        if hasattr(before, "dtype") and hasattr(now, "dtype"):
            return self._same_arrays(before, now)
        if isinstance(before, float) or isinstance(now, float):
            if not (_is_number(before) and _is_number(now)):
                return False
            both_nan = math.isnan(before) and math.isnan(now)
            return both_nan or math.isclose(before, now, rel_tol=self._tolerance, abs_tol=0.0)
        if type(before) is not type(now):  # True is not 1.
            return False
        if self._tolerance and _is_number(before):
            return math.isclose(before, now, rel_tol=self._tolerance)
        return bool(before == now)

    def _same_arrays(self, before: Any, now: Any) -> bool:
        if before.dtype != now.dtype or before.shape != now.shape:
            return False
        if before.dtype.kind in "fc":
            import numpy as np  # The arrays come from it.

            return bool(np.allclose(before, now, rtol=self._tolerance, atol=0.0, equal_nan=True))
        return before.tobytes() == now.tobytes()  # type: ignore[no-any-return]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    text = json_line(value).decode().rstrip("\n")
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
