"""The regression guard finds what has become slower, and does not fail because of another interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.callgrind import missing
from benchmarks.instructions import (
    LIMIT,
    NOT_COMPARED,
    OTHER_LIMIT,
    compare,
    read_records,
    this_interpreter,
    version_of,
)
from tests.guards.tree import ROOT, supported_pythons

HERE = {"python": "3.11.7 (here)", "processor": "x86_64"}
COUNTS = {"yardstick": {"alone": 100.0}, "ours": {"alone": 200.0}}


def record_of(python: str, yardstick: float, ours: float) -> dict[str, Any]:
    counts = {"yardstick": {"alone": yardstick}, "ours": {"alone": ours}}
    return {"interpreter": {**HERE, "python": python}, "instructions": counts}


@pytest.mark.parametrize(
    ("records", "share", "limit"),
    [
        ([record_of("3.11.7 (here)", 100, 200)], 0.0, LIMIT),
        ([record_of("3.11.7 (here)", 100, 160)], 0.25, LIMIT),
        # The yardstick became slower as well: on the same interpreter that is no excuse.
        ([record_of("3.11.7 (here)", 80, 160)], 0.25, LIMIT),
        ([record_of("3.11.7 (here)", 100, 250)], -0.2, LIMIT),
        # All of another interpreter takes half as many instructions: the ratio is the same.
        ([record_of("3.11.9 (there)", 50, 100)], 0.0, OTHER_LIMIT),
        ([record_of("3.11.9 (there)", 100, 160)], 0.25, OTHER_LIMIT),
        # The nearest of two other interpreters, and this one before any other.
        ([record_of("3.11.9 (there)", 100, 100), record_of("3.11.2 (far)", 100, 190)], 200 / 190 - 1, OTHER_LIMIT),
        ([record_of("3.11.9 (there)", 100, 200), record_of("3.11.7 (here)", 100, 160)], 0.25, LIMIT),
    ],
)
def test_the_count_is_compared_on_this_interpreter_and_the_ratio_on_another(records, share, limit):
    (growth,) = compare(COUNTS, HERE, records)
    assert growth.share == pytest.approx(share)
    assert growth.limit == limit
    assert growth.failed() is (share > limit)


def test_another_version_of_python_is_not_compared():
    assert compare(COUNTS, HERE, [record_of("3.12.1 (there)", 100, 100), record_of("3.1.1 (old)", 100, 100)]) == []


def test_a_failure_gives_both_figures():
    (growth,) = compare(COUNTS, HERE, [record_of("3.11.7 (here)", 100, 160)])
    expected = (
        "FAILED: ours, alone: 200 instructions, 160 recorded (2.00 × the yardstick, 1.60 × recorded): +25.0% (limit 5%)"
    )
    assert str(growth) == expected


def test_this_interpreters_record_needs_no_yardstick():
    (growth,) = compare({"ours": {"alone": 200.0}}, HERE, [record_of("3.11.7 (here)", 100, 160)])
    assert str(growth) == "FAILED: ours, alone: 200 instructions, 160 recorded: +25.0% (limit 5%)"


def test_every_supported_python_has_a_record():
    records = read_records()
    assert {version_of(each["interpreter"]) for each in records} == set(supported_pythons())
    for each in records:
        assert {*each["instructions"]} >= {"yardstick", "ours", "native"}


def guard(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.instructions", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environ, capture_output=True, text=True)


def test_without_valgrind_it_says_what_to_install():
    done = guard(PATH="/nowhere")
    assert done.returncode == NOT_COMPARED
    assert "apt-get install valgrind" in done.stdout


@pytest.mark.slow
def test_no_call_no_item_and_no_import_has_become_slower():
    if programs := missing():
        pytest.skip(f"{' and '.join(programs)} not found: apt-get install valgrind")
    if version_of(this_interpreter()) not in {version_of(each["interpreter"]) for each in read_records()}:
        pytest.skip(f"there is no record of Python {version_of(this_interpreter())}")
    done = guard("--peer", "ours", "--only", "concurrent", "streams", "import")
    assert done.returncode == 0, done.stdout + done.stderr
