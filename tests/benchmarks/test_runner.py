"""The runner: real processes, one short round."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.__main__ import STARTS, WORK
from benchmarks.peers import PEERS, Kind
from benchmarks.rounds import read_result
from benchmarks.workloads import WORKLOADS
from harness.processes import ROOT


def test_workloads_of_the_runner_and_of_the_peers_exist():
    assert {work.function or name for name, work in WORK.items()} == set(WORKLOADS)
    names = {name.split()[0] for name in (*WORK, *STARTS)}
    assert all({*kind.only, *kind.lacks} <= names for kind in PEERS.values())


@pytest.mark.slow
def test_short_run_measures_figures_cpu_and_memory_of_each_peer(tmp_path):
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--json", path, "--peers", "yardstick", "ours"]
    names = ["alone", "chunks", "unary", "lists", "array", "pipeline", "cancel", "hello"]
    run = subprocess.run([*command, "--only", *names], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    result = read_result(path)
    assert set(result["figures"]) == set(names)
    assert {name for name, peers in result["figures"].items() if "yardstick" not in peers} == {"cancel", "hello"}
    for name, peers in result["figures"].items():
        for figures in peers.values():
            cost = "cpu_ms" if name == "hello" else "cpu_us"
            assert all(figures[each][0] > 0 for each in (cost, "peak_mib"))
    assert result["figures"]["pipeline"]["ours"]["over_one_stage"][0] > 1, "three workers take more than one"
    assert "| 64 concurrent" not in run.stdout
    assert "1 call at a time: p50, µs" in run.stdout


def test_no_other_peer_than_those_that_say_so_runs_the_compiled_build(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/of/the/caller")
    monkeypatch.setattr("benchmarks.peers.compiled_build", lambda: tmp_path / "compiled")
    assert PEERS["ours-socket"].environ(tmp_path)["PYTHONPATH"] == str(tmp_path / "compiled")
    paths = {name: kind.environ(tmp_path)["PYTHONPATH"] for name, kind in PEERS.items() if name != "ours-socket"}
    assert paths.pop("ours-compiled") == str(tmp_path / "compiled")
    assert set(paths.values()) == {""}


def test_compiled_peer_is_left_out_without_a_build(monkeypatch):
    monkeypatch.setattr("benchmarks.peers.compiled_build", lambda: None)
    assert PEERS["ours"].missing() is None
    assert PEERS["ours-compiled"].missing() == "there is no compiled build of these sources"
    assert Kind("a", False, "a", "no_such_package").missing() == "no_such_package is not installed here"
