"""Files and classes stay small enough to be read in one go, and files are named after what is in them."""

from __future__ import annotations

import ast

from tests.guards.tree import ROOT, modules, project_files

HARD_LIMIT = 600
MOST_METHODS = 30
KNOWN_LARGE: set[str] = set()  # This list only shrinks.
SAY_NOTHING = {"utils", "util", "helpers", "helper", "manager", "managers", "misc", "common"}


def lines(path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_python_file_is_too_long():
    long = {str(p.relative_to(ROOT)): n for p in project_files() if p.suffix == ".py" and (n := lines(p)) > HARD_LIMIT}
    assert not long, f"more than {HARD_LIMIT} lines, split them by what they know: {long}"


def test_no_class_has_too_many_methods():
    # A method that is declared in several overloads is one method.
    methods = {
        node.name: len({each.name for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)})
        for module in [*modules(), *modules(ROOT, "harness")]
        if module.text().count("def ") > MOST_METHODS
        for node in ast.walk(module.tree())
        if isinstance(node, ast.ClassDef)
    }
    large = {name for name, count in methods.items() if count > MOST_METHODS}
    assert large - KNOWN_LARGE == set(), f"more than {MOST_METHODS} methods: move a duty into a class of its own"
    assert KNOWN_LARGE - large == set(), "these classes are small enough: take them from KNOWN_LARGE"


def test_names_say_what_is_in_a_file():
    nothing = [str(p.relative_to(ROOT)) for p in project_files() if p.suffix == ".py" and p.stem.lower() in SAY_NOTHING]
    assert not nothing, f"name these after what they hold: {nothing}"
