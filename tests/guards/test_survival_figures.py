"""The figures in harness/README.md are those of the committed result of `make survival`, which kept its promises."""

from __future__ import annotations

import json
from typing import Any

from harness.report import PAGE, Found, written
from harness.runs.survival import PHASES, RESULT, WHOLE_S, table


def test_the_page_shows_the_committed_result_and_nothing_else() -> None:
    page = PAGE.read_text(encoding="utf-8")
    if RESULT.exists():
        assert page == written(page, "survival", table(json.loads(RESULT.read_text(encoding="utf-8")))), (
            "run `make survival`"
        )
    else:
        assert "<!-- survival -->\n<!-- /survival -->" in page, "figures without a result: run `make survival`"


def test_a_committed_result_is_a_whole_run_that_broke_no_promise() -> None:
    result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {"found": {}}
    assert list(result["found"]) in ([], list(PHASES))
    for phase, by_plane in result["found"].items():
        assert result["options"]["seconds"] >= WHOLE_S
        assert {"unix", "tcp"} <= set(by_plane)
        for plane, found in by_plane.items():
            assert found["promises"]
            assert all(each["kept"] for each in found["promises"]), f"{phase}, {plane}"


def a_result(found: Found) -> dict[str, Any]:
    return {
        "machine": {"cpu": "a CPU", "cores": 2, "system": "Linux", "python": "CPython"},
        "load": [0.1, 0.2],
        "options": {"planes": ["unix", "tcp"], "seconds": 60.0},
        "found": {"rotation": {"tcp": found.as_json()}},
    }


def test_the_table_shows_figures_by_plane_and_broken_promises() -> None:
    figures = {"last_p50_ms": 1.0, "last_max_ms": 60.0, "first_p50_ms": 2.0, "first_max_ms": 61.0, "sent_max_ms": 59.0}
    found = Found(figures={"kills": 7, "clients": 4, **figures})
    found.promise("nobody calls it", False, "60.0 ms")
    found.promise("nothing fails", True, "0 did")
    assert found.broken == ["nobody calls it: 60.0 ms"]
    shown = table(a_result(found))
    assert "| rotation | workers killed; clients that watch | – | 7; 4 |" in shown
    assert "- rotation: nobody calls it (tcp: **BROKEN**, 60.0 ms)" in shown
    assert "- rotation: nothing fails (tcp: kept, 0 did)" in shown
    page = written("before\n<!-- x -->\nold\n<!-- /x -->\nafter\n", "x", shown)
    assert page == f"before\n<!-- x -->\n{shown}\n<!-- /x -->\nafter\n"
