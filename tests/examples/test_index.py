"""The index of the examples is complete, and every program says what it shows and how to run it."""

from __future__ import annotations

import ast

import pytest

from tests.examples.programs import EXAMPLES
from tests.guards import documents

FILES = sorted(path for path in EXAMPLES.rglob("*.py"))


def short(path):
    return str(path.relative_to(EXAMPLES))


def test_every_example_is_in_the_index_with_its_programs():
    index = EXAMPLES / "README.md"
    assert documents.broken_links(index) == []
    rows = {line.split("]")[0].removeprefix("| ["): line for line in index.read_text().splitlines() if "| [" in line}
    assert set(rows) == {path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"}
    for path in FILES:
        if "__main__" in path.read_text():
            assert f"`{path.name}" in rows[path.parent.name], f"{short(path)} is not in the index"


@pytest.mark.parametrize("path", FILES, ids=short)
def test_a_program_says_how_to_run_it(path):
    text = path.read_text()
    said = ast.get_docstring(ast.parse(text)) or ""
    assert said, "it opens with a docstring"
    if "__main__" in text:
        assert f"python examples/{short(path)}" in said
