"""The pictures of a result."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("matplotlib") is None:
    pytest.skip("the extra `bench` is not installed", allow_module_level=True)

from benchmarks.plots import CHARTS, bars, shown_peers
from benchmarks.rounds import Rounds
from benchmarks.table import SWEEP
from harness.processes import ROOT
from tests.benchmarks.samples import CALLS, result, rounds_of

SWEPT: Rounds = {
    f"sweep {streams}": {peer: rounds_of(per_s=[5e4, 6e4], cpu_us=[9.0, 8.0], peak_mib=[70.0, 90.0]) for peer in peers}
    for streams, peers in zip(SWEEP, [("ours", "grpc.aio")] * 5 + [("ours",)], strict=True)
}


def draw(path: Path) -> dict[str, bytes]:
    """Draw the pictures in a process of its own, since matplotlib keeps its fonts open."""
    command = [sys.executable, "-m", "benchmarks.plots", str(path)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {each.name: each.read_bytes() for each in map(Path, printed.splitlines())}


def test_bars_are_in_the_unit_of_the_panel_and_ours_come_first():
    found = result({"unary": {"grpc.aio": rounds_of(p50_us=[5000.0]), "ours": rounds_of(p50_us=[2000.0])}})
    panel = next(panel for chart in CHARTS for panel in chart.panels if panel.workload == "unary")
    peers = shown_peers(found, ["unary"])
    assert peers == ["ours", "grpc.aio"]
    assert bars(found, panel, peers) == {"ours": [2.0, 2.0, 2.0], "grpc.aio": [5.0, 5.0, 5.0]}


def test_a_picture_for_each_group_that_was_measured_as_png_and_svg(tmp_path):
    path = tmp_path / "sample.json"
    path.write_text(json.dumps(result(CALLS | SWEPT)))
    drawn = draw(path)
    assert set(drawn) == {f"sample-{name}.{kind}" for name in ("calls", "sweep") for kind in ("png", "svg")}
    assert drawn["sample-calls.png"].startswith(b"\x89PNG")
    calls, sweep = drawn["sample-calls.svg"].decode(), drawn["sample-sweep.svg"].decode()
    for words in (
        "64 callers at once: calls/s",
        "1 caller: median time of a call, µs",
        "more is better",
        ">110<",
        ">600<",
    ):
        assert words in calls
    for words in ("items/s", "peak memory of all processes, MiB", "streams at the same time", "8,192", "grpc.aio"):
        assert words in sweep
    assert "QUICK" not in calls
    assert draw(path) == drawn, "the same figures give the same file"


def test_picture_of_a_quick_run_says_so(tmp_path):
    path = tmp_path / "sample.json"
    path.write_text(json.dumps(result(CALLS, quick=True)))
    assert "QUICK RUN, NOT A MEASUREMENT" in draw(path)["sample-calls.svg"].decode()
