"""The figures in README.md and docs/benchmarks.md are those of the committed result files, rendered by a command."""

from __future__ import annotations

import pytest

from benchmarks.rounds import RESULTS, read_result, summarise
from benchmarks.table import PAGE, README, render_page, render_short, short_file, written


@pytest.mark.parametrize("path", [README, PAGE], ids=["README", "page"])
def test_page_shows_the_committed_result(path):
    content = render_short(read_result(short_file())) if path == README else render_page()
    page = path.read_text(encoding="utf-8")
    assert page == written(page, content), "run `python -m benchmarks.table --write`"


COMMITTED = [path for path in sorted(RESULTS.glob("*.json")) if not path.name.startswith("partial")]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_result_is_a_whole_run_without_failures(path):
    committed = read_result(path)
    if "rounds" not in committed:
        pytest.skip("a result with a format and a test of its own")
    assert not committed["failures"]
    assert not committed["method"]["quick"]
    assert {"figures": committed["figures"], "ratios": committed["ratios"]} == summarise(committed["rounds"])
