"""The targets, and what a result says about them."""

from __future__ import annotations

import json

import pytest

from benchmarks.__main__ import STARTS, WORK
from benchmarks.rounds import Rounds
from benchmarks.table import TABLES, render_targets
from benchmarks.targets import COMMANDS, TARGETS, Target, outcome, outcomes
from tests.benchmarks.samples import CALLS, result, rounds_of


def at_least(bound: float, *against: str) -> Target:
    return Target("calls/s", "latest.json", "concurrent", "per_s", bound, against, at_least=True)


def at_most(bound: float, *against: str) -> Target:
    return Target("CPU", "latest.json", "concurrent", "cpu_us", bound, against)


@pytest.mark.parametrize(
    ("target", "value", "met"),
    [(at_most(2.5), 2.5, True), (at_most(2.5), 2.6, False), (at_least(8), 8.0, True), (at_least(8), 7.9, False)],
)
def test_bound(target, value, met):
    assert target.met(value) is met


@pytest.mark.parametrize(
    ("target", "value", "mark"),
    [
        (at_most(4, "yardstick"), [3.0, 2.0, 4.0], "met"),
        (at_most(3.5, "yardstick"), [3.0, 2.0, 4.0], "met, not in every round"),
        (at_most(2.5, "yardstick"), [3.0, 2.0, 4.0], "**short**"),
        (at_least(0.5, "yardstick"), [0.5, 0.5, 0.5], "met"),
        (at_least(105), [110.0, 100.0, 120.0], "met, not in every round"),
        (at_most(1, "nats-py"), None, "not measured"),
    ],
)
def test_outcome(target, value, mark):
    found = outcome(target, result(CALLS))
    assert (found.value, found.mark) == (value, mark)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (at_most(1 / 6, "Dynamo"), "≤ 1/6 × Dynamo"),
        (at_most(3072), "≤ 3,072"),
        (at_least(0.85, "bare"), "≥ 0.85 × bare"),
        (at_least(15, "Dynamo"), "≥ 15 × Dynamo"),
    ],
)
def test_text_of_a_target(target, text):
    assert str(target) == text


def test_target_against_several_peers_is_decided_by_the_best_of_them():
    peers = {name: rounds_of(per_s=[value]) for name, value in (("ours", 60.0), ("SSE", 30.0), ("nats-py", 20.0))}
    found = outcome(at_least(2.5, "nats-py", "SSE", "Ray Serve"), result({"concurrent": peers}))
    assert (found.value, found.peer, found.mark) == ([2.0, 2.0, 2.0], "SSE", "**short**")


def test_compiled_build_counts_where_it_was_measured():
    rounds: Rounds = {"concurrent": {**CALLS["concurrent"], "ours-compiled": rounds_of(per_s=[900.0])}}
    assert outcome(at_least(500), result(rounds)).mark == "met"
    assert outcome(at_least(500), result(CALLS)).mark == "**short**"


def test_targets_without_a_result_file_are_not_measured(tmp_path):
    assert {each.mark for each in outcomes(folder=tmp_path)} == {"not measured"}
    (tmp_path / "latest.json").write_text(json.dumps(result(CALLS)))
    lines = render_targets(outcomes([at_most(4, "yardstick")], tmp_path)).splitlines()
    assert [cell.strip() for cell in lines[-1].strip("|").split("|")] == [
        "CPU",
        "≤ 4 × yardstick",
        "3.00 (2.00–4.00) × yardstick",
        "met",
        "`make bench`",
    ]


def test_targets_and_tables_name_workloads_that_there_are():
    known = {*WORK, *STARTS}
    assert {row.workload for rows in TABLES.values() for row in rows} <= known
    assert {each.workload for each in TARGETS if each.file in ("latest.json", "peers.json")} <= known
    assert {each.file for each in TARGETS} <= set(COMMANDS)
