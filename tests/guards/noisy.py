"""Tests that fail the first time, or each time; test_repeats.py runs them in a process of their own."""

from __future__ import annotations

import pytest

runs: dict[str, int] = {}


def nth(name: str) -> int:
    runs[name] = runs.get(name, 0) + 1
    return runs[name]


@pytest.fixture
def fresh() -> list[int]:
    return []


@pytest.mark.noisy(reason="the machine was busy")
def test_once(fresh: list[int]) -> None:
    fresh.append(1)
    assert fresh == [1]
    assert nth("once") == 2, "the first time"


@pytest.mark.noisy(reason="the machine was busy")
def test_always() -> None:
    nth("always")
    raise LookupError(f"time {runs['always']}")


@pytest.mark.noisy
def test_without_a_reason() -> None:
    pass


def test_unmarked() -> None:
    assert nth("unmarked") == 2


@pytest.mark.noisy(reason="the machine was busy")
def test_quiet() -> None:
    assert nth("quiet") == 1
