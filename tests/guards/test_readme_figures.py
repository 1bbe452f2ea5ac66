"""The figures in README.md and docs/benchmarks.md are those of the committed result file, rendered by a command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rounds import Rounds, read_result, summarise
from benchmarks.table import LATEST, MARKED, PAGE, README, Target, render, render_short

METHOD = {
    "machine": {
        "cpu": "a CPU",
        "cores": 2,
        "system": "Linux",
        "python": "CPython",
        "python_build": {"pgo": True, "lto": False},
        "packages": {"uvloop": "1"},
    },
    "method": {"rounds": 3, "quick": False},
}


@pytest.mark.parametrize(("path", "rendered"), [(README, render_short), (PAGE, render)], ids=["README", "page"])
def test_page_shows_the_committed_result(path: Path, rendered: Callable[[dict[str, Any]], str]) -> None:
    result = read_result(LATEST)
    shown = MARKED.findall(path.read_text(encoding="utf-8"))
    assert len(shown) == 1, f"{path.name} needs one <!-- figures --> … <!-- /figures -->"
    found = MARKED.search(path.read_text(encoding="utf-8"))
    assert found is not None
    assert found[0] == f"{found[1]}{rendered(result)}{found[2]}", "run `python -m benchmarks.table --write`"


def test_committed_result_is_a_whole_run_without_failures() -> None:
    result = read_result(LATEST)
    assert not result["failures"]
    assert not result["method"]["quick"]
    assert {"figures": result["figures"], "ratios": result["ratios"]} == summarise(result["rounds"])


def test_ratio_is_the_median_of_each_rounds_own() -> None:
    rounds = {
        "concurrent": {
            "ours": [{"cpu_us": 2.0}, {"cpu_us": 30.0}, {"cpu_us": 4.0}],
            "yardstick": [{"cpu_us": 1.0}, {"cpu_us": 10.0}, {"cpu_us": 1.0}],
        }
    }
    summary = summarise(rounds)
    assert summary["figures"]["concurrent"] == {
        "ours": {"cpu_us": [4.0, 2.0, 30.0]},
        "yardstick": {"cpu_us": [1.0, 1.0, 10.0]},
    }
    assert summary["ratios"]["concurrent"] == {"ours ÷ yardstick": {"cpu_us": [3.0, 2.0, 4.0]}}
    row = next(line for line in render({**METHOD, **summary}).splitlines() if "CPU µs a call" in line)
    text, *cells = (cell.strip() for cell in row.strip("|").split("|"))
    assert text == "64 concurrent calls: CPU µs a call"
    assert cells == ["4.00", "1.00", "–", "3.00 (2.00–4.00)", "–", "≤ 2.5 × yardstick", "**short**"]


def test_a_failed_round_counts_for_nothing() -> None:
    rounds: Rounds = {
        "alone": {"ours": [{"error": "it broke"}, {"p50_us": 5.0}], "grpc.aio": [{"p50_us": 9.0}, {"p50_us": 50.0}]}
    }
    summary = summarise(rounds)
    assert summary["figures"]["alone"]["ours"] == {"p50_us": [5.0, 5.0, 5.0]}
    assert summary["ratios"]["alone"] == {"ours ÷ grpc.aio": {"p50_us": [0.1, 0.1, 0.1]}}


def test_a_target_that_some_round_misses_is_not_simply_met() -> None:
    rounds = {
        "streams": {
            "ours": [{"per_s": 100.0}, {"per_s": 100.0}, {"per_s": 100.0}],
            "grpc.aio": [{"per_s": 4.0}, {"per_s": 4.0}, {"per_s": 10.0}],
        }
    }
    row = next(line for line in render({**METHOD, **summarise(rounds)}).splitlines() if "items/s" in line)
    assert "met, not in every round" in row


@pytest.mark.parametrize(
    ("target", "value", "met"),
    [
        (Target(2.5, "yardstick"), 2.5, True),
        (Target(2.5, "yardstick"), 2.6, False),
        (Target(8, "grpc.aio", at_least=True), 8.0, True),
        (Target(8, "grpc.aio", at_least=True), 7.9, False),
    ],
)
def test_target(target: Target, value: float, met: bool) -> None:
    assert target.met(value) is met
