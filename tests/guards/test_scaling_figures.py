"""The figures in docs/scaling.md are those of the committed result."""

from __future__ import annotations

import json

from benchmarks.scaling import PAGE, RESULT, written


def test_the_page_shows_the_committed_result():
    page = PAGE.read_text(encoding="utf-8")
    assert page == written(page, json.loads(RESULT.read_text(encoding="utf-8"))), "run `make scaling`"
