"""Files stay small enough to be read in one go, and are named after what is in them."""

from __future__ import annotations

import statistics

from tests.guards.tree import ROOT, modules, project_files

HARD_LIMIT = 600
MEDIAN_BELOW = 200
SAY_NOTHING = {"utils", "util", "helpers", "helper", "manager", "managers", "misc", "common"}


def lines(path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_python_file_is_too_long():
    long = {str(p.relative_to(ROOT)): n for p in project_files() if p.suffix == ".py" and (n := lines(p)) > HARD_LIMIT}
    assert not long, f"more than {HARD_LIMIT} lines, split them by what they know: {long}"


def test_the_median_file_of_the_package_is_short():
    sizes = sorted((lines(module.path), module.name) for module in modules())
    median = statistics.median(size for size, _ in sizes)
    assert median < MEDIAN_BELOW, f"the median file has {median} lines; the longest are {sizes[-5:]}"


def test_names_say_what_is_in_a_file():
    nothing = [str(p.relative_to(ROOT)) for p in project_files() if p.suffix == ".py" and p.stem.lower() in SAY_NOTHING]
    assert not nothing, f"name these after what they hold: {nothing}"
