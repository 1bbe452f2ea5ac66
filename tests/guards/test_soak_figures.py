"""The figures of the soak in harness/README.md are those of the committed result: a whole run that ended well."""

from __future__ import annotations

import json

from harness.report import PAGE, written
from harness.runs.soak import RESULT
from harness.soak.table import render


def test_the_page_shows_the_committed_result():
    page = PAGE.read_text(encoding="utf-8")
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert page == written(page, "soak", render(result)), (
        "run `python -m harness.runs.soak --output harness/results/soak.json`"
    )


def test_the_committed_result_is_a_whole_run_that_ended_well():
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert result["wrong"] == []
    assert result["options"]["seconds"] >= 600
    assert {"killed", "ended", "cut", "reset", "stopped"} <= result["faults"].keys()
