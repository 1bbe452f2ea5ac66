"""Rounds in which the peers take turns, ratios within a round, and the result file."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from benchmarks.rounds import Figures, Rounds, Run, ratio, read_result, summarise
from harness.processes import ChildFailed
from tests.benchmarks.samples import CALLS, rounds_of


def test_ratio_is_the_median_of_each_rounds_own():
    summary = summarise(CALLS)
    assert summary["figures"]["concurrent"]["ours"]["cpu_us"] == [4.0, 2.0, 30.0]
    assert summary["ratios"]["concurrent"]["ours ÷ yardstick"]["cpu_us"] == [3.0, 2.0, 4.0]


def test_peers_over_tcp_are_compared_with_ours_over_tcp():
    assert set(summarise(CALLS)["ratios"]["alone"]) == {"ours ÷ grpc.aio", "ours tcp ÷ grpc.aio tcp"}


def test_both_builds_of_ours_are_compared_with_each_peer():
    rounds: Rounds = {"alone": {name: rounds_of(p50_us=[1.0]) for name in ("ours", "ours-compiled", "grpc.aio")}}
    names = {"ours ÷ grpc.aio", "ours-compiled ÷ grpc.aio", "ours ÷ ours-compiled", "ours-compiled ÷ ours"}
    assert set(summarise(rounds)["ratios"]["alone"]) == names


def test_a_failed_round_counts_for_nothing_and_the_other_rounds_stay_in_step():
    rounds: Rounds = {
        "alone": {"ours": [{"error": "it broke"}, {"p50_us": 5.0}], "grpc.aio": [{"p50_us": 9.0}, {"p50_us": 50.0}]}
    }
    summary = summarise(rounds)
    assert summary["figures"]["alone"]["ours"] == {"p50_us": [5.0, 5.0, 5.0]}
    assert summary["ratios"]["alone"] == {"ours ÷ grpc.aio": {"p50_us": [0.1, 0.1, 0.1]}}


def test_figure_that_one_peer_lacks_has_no_ratio():
    assert ratio(CALLS, "alone", "ours", "yardstick", "p50_us") is None
    assert ratio(CALLS, "concurrent", "ours", "yardstick", "p50_us") is None
    assert ratio(CALLS, "no such workload", "ours", "yardstick", "p50_us") is None


async def test_peers_take_turns_and_each_round_begins_with_another(capsys):
    order = []

    async def measure(workload: str, peer: str) -> Figures:
        order.append(workload + peer)
        return {"per_s": 1.0}

    run = Run()
    pairs = [("x", "a"), ("x", "b"), ("y", "a"), ("y", "b")]
    await run.interleave(2, {pair: functools.partial(measure, *pair) for pair in pairs})
    assert order == ["xa", "xb", "ya", "yb", "xb", "xa", "yb", "ya"]
    assert run.rounds["x"]["a"] == [{"per_s": 1.0}, {"per_s": 1.0}]


async def test_result_file_keeps_rounds_summary_and_failures(tmp_path: Path, capsys):
    run = Run()
    answers: Iterator[float | ChildFailed] = iter([3.0, ChildFailed("the worker ended"), 5.0])

    async def measure() -> Figures:
        answer = next(answers)
        if isinstance(answer, ChildFailed):
            raise answer
        return {"per_s": answer}

    await run.interleave(3, {("streams", "ours"): measure})
    path = tmp_path / "folder" / "result.json"
    written = run.write(path, rounds=3, quick=True, sizes={"seconds": 1})
    assert read_result(path) == written
    assert written["rounds"] == {"streams": {"ours": [{"per_s": 3.0}, {"error": "the worker ended"}, {"per_s": 5.0}]}}
    assert written["figures"] == {"streams": {"ours": {"per_s": [4.0, 3.0, 5.0]}}}
    assert written["failures"] == ["streams, ours: the worker ended"]
    assert written["method"] == {"rounds": 3, "quick": True, "sizes": {"seconds": 1}}
    assert {"pgo", "lto", "compiler"} == set(written["machine"]["python_build"])
    assert "FAILED: streams, ours: the worker ended" in capsys.readouterr().out
