"""The lines of code in docs/compared.md are counted, and ours are the fewest."""

from __future__ import annotations

import re

from benchmarks.compared import MARKED, PAGE, proto_lines, python_lines, render


def test_the_page_shows_what_is_counted() -> None:
    found = MARKED.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None
    assert found[0] == f"{found[1]}{render()}{found[2]}", "run `python -m benchmarks.compared --write`"


def test_ours_is_the_shortest() -> None:
    for line in render().splitlines()[2:]:
        ours, *theirs = map(int, re.findall(r"\[(\d+)\]", line))
        assert ours < min(theirs), line


def test_blanks_comments_and_docstrings_are_not_code() -> None:
    source = (
        '"""A module\n\nof two."""\n\nimport os  # yes\n\n\n# no\ndef f():\n    """Doc."""\n    return """a\n    b"""\n'
    )
    assert python_lines(source) == 4
    assert proto_lines('syntax = "proto3";\n\n// no\nmessage A {\n}\n') == 3
