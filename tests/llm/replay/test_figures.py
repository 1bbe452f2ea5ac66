"""The figures in docs/llm/replay.md are those of the committed results."""

import json

from benchmarks.llm.replay import table
from benchmarks.rounds import RESULTS
from tests.guards.tree import ROOT

PAGE = (ROOT / "docs/llm/replay.md").read_text()


def test_the_page_has_the_table_of_the_result():
    cells = json.loads((RESULTS / "replay.json").read_text())["figures"]
    assert "\n".join(table(cells)) in PAGE


def test_processes_and_virtual_time_agree_within_a_tenth():
    found = json.loads((RESULTS / "replay-real.json").read_text())
    for policy in ("kv", "least_loaded"):
        virtual, real = found[policy]["virtual"]["mean_s"], found[policy]["processes"]["mean_s"]
        assert abs(real / virtual - 1) < 0.1
        assert f"| {policy} | {virtual:.2f} s | {real:.2f} s |" in PAGE
