"""The figures in docs/llm/replay.md are those of the committed results."""

import json

from benchmarks.llm import pools
from benchmarks.llm.replay import table
from benchmarks.rounds import RESULTS
from tests.guards.tree import ROOT

PAGE = (ROOT / "docs/llm/replay.md").read_text()


def test_the_page_has_the_table_of_the_result():
    cells = json.loads((RESULTS / "replay.json").read_text())["figures"]
    assert "\n".join(table(cells)) in PAGE


def test_the_page_has_the_table_of_pools():
    cells = json.loads((RESULTS / "pools.json").read_text())["cells"]
    assert "\n".join(pools.table(cells)) in PAGE
    for name, rate in (each for each in pools.LOADS if each[0] != "conversation"):
        both, split = (cells[f"{name} {rate:g} {prefill}"] for prefill in (0, 2))
        assert split["itl_p99_s"] < both["itl_p99_s"], "what the page says of 2 prefill workers"
        assert split["ttft_s"] < 1.1 * both["ttft_s"]


def test_processes_and_virtual_time_agree_within_a_tenth():
    found = json.loads((RESULTS / "replay-real.json").read_text())
    for policy in ("kv", "least_loaded"):
        virtual, real = found[policy]["virtual"]["mean_s"], found[policy]["processes"]["mean_s"]
        assert abs(real / virtual - 1) < 0.1
        assert f"| {policy} | {virtual:.2f} s | {real:.2f} s |" in PAGE


def test_pools_of_processes_and_of_virtual_time_agree_within_a_tenth():
    found = json.loads((RESULTS / "pools-real.json").read_text())
    for name, workers in (("both", "8 do both"), ("pools", "2 + 6")):
        virtual, real = found[name]["virtual"], found[name]["processes"]
        assert abs(real["mean_s"] / virtual["mean_s"] - 1) < 0.1
        cells = [f"{1000 * each[key]:.0f} ms" for key in ("mean_s", "itl_p99_s") for each in (virtual, real)]
        assert f"| {workers} | {' | '.join(cells)} |" in PAGE
    both, split = (found[name]["processes"] for name in ("both", "pools"))
    assert split["itl_p99_s"] < both["itl_p99_s"]
    assert split["mean_s"] < 1.1 * both["mean_s"]
