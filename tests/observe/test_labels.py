"""The labels that a program adds to its metrics are few, short and its own."""

from __future__ import annotations

from typing import Any

import pytest

from triton_distributed.observe.labels import MOST_CHARACTERS, MOST_LABELS, checked_labels


@pytest.mark.parametrize("given", [{"model": "llama", "_a1": "ü"}, [("model", "llama"), ("_a1", "ü")]])
def test_labels_are_sorted_pairs(given):
    assert checked_labels(given) == (("_a1", "ü"), ("model", "llama"))


def test_none_are_needed():
    assert checked_labels(None) == checked_labels({}) == checked_labels([]) == ()


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("model", TypeError, "names with values"),
        (7, TypeError, "names with values"),
        ([("model",)], TypeError, "names with values"),
        ({"model": 7}, TypeError, "'model'=7: .* must be text"),
        ({7: "model"}, TypeError, "7='model': .* must be text"),
        ({"model": None}, TypeError, "must be text"),
        ({f"l{number}": "x" for number in range(MOST_LABELS + 1)}, ValueError, "9 labels, the limit is 8"),
        ([("model", "a"), ("model", "b")], ValueError, "given twice"),
        ({"endpoint": "x"}, ValueError, "'endpoint'.*own"),
        ({"le": "x"}, ValueError, "'le'.*own"),
        ({"replica": "x"}, ValueError, "'replica'.*own"),
        ({"pod": "x"}, ValueError, "'pod'.*own"),
        ({"namespace": "x"}, ValueError, "'namespace'.*own"),
        ({"__name__": "x"}, ValueError, "'__name__'.*letters"),
        ({"my-label": "x"}, ValueError, "'my-label'.*letters"),
        ({"1st": "x"}, ValueError, "'1st'.*letters"),
        ({"": "x"}, ValueError, "letters"),
        ({"model": ""}, ValueError, "1 to 128 characters"),
        ({"model": "x" * (MOST_CHARACTERS + 1)}, ValueError, "1 to 128 characters, not 129"),
        ({"model": "two\nlines"}, ValueError, "printable"),
    ],
)
def test_others_are_refused(given: Any, error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        checked_labels(given)
