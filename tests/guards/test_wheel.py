"""The wheel holds the package and nothing that only our own tests use."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path

import pytest

from tests.guards.tree import PACKAGE, ROOT, SRC, Module, imports, modules

TESTING = f"{PACKAGE}.testing"
PAGES = "\n".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("testing.md", "chaos.md"))


def documented(page: str, faces: list[str]) -> set[str]:
    """Modules that hold a name which the page mentions, or that the page runs.

    Args:
        page: text.
        faces: modules whose `__all__` users import from.
    """
    words = set(re.findall(r"\w+", page))
    found: set[str] = set()
    for face in faces:
        if f"python -m {face} " in page:
            found.add(f"{face}.__main__")
        module = importlib.import_module(face)
        found |= {getattr(getattr(module, name), "__module__", face) for name in module.__all__ if name in words}
    return found


def reached(start: set[str], files: dict[str, Module]) -> set[str]:
    """These modules, and all that they import, directly or through others."""
    found, todo = set(), list(start & files.keys())
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            used = {each for _, each in imports(files[name])}
            todo += [each for full in used for each in (full, full.rpartition(".")[0]) if each in files]
    return found


def loaded_by_others() -> set[str]:
    """Modules that other programs load by their name in pyproject.toml, such as a plugin of pytest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {place.partition(":")[0] for group in project["entry-points"].values() for place in group.values()}


def faces() -> list[str]:
    return [TESTING, f"{TESTING}.chaos"]


def test_every_module_for_tests_is_of_use_to_a_user() -> None:
    files = {module.name: module for module in modules() if module.name.startswith(TESTING)}
    start = documented(PAGES, faces()) - set(faces())  # a face reaches all that it exports
    unused = files.keys() - reached(start | loaded_by_others(), files) - set(faces())
    assert not unused, f"no page of the documentation leads to {sorted(unused)}: move them to harness/, or tests/"


@pytest.mark.parametrize("face", faces())
def test_every_name_for_tests_is_documented(face: str) -> None:
    words = set(re.findall(r"\w+", PAGES))
    missing = [name for name in importlib.import_module(face).__all__ if name not in words]
    assert not missing, f"docs/testing.md and docs/chaos.md say nothing of {missing}"


def test_the_wheel_is_made_of_the_package_alone() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert setuptools["packages"]["find"] == {"where": ["src"]}
    assert setuptools["package-data"] == {PACKAGE: ["py.typed", "status/dashboard.*"]}
    others = {
        each.name for each in (SRC / PACKAGE).rglob("*.*") if each.is_file() and each.suffix not in (".py", ".pyc")
    }
    assert others == {"py.typed", "dashboard.html", "dashboard.css", "dashboard.js"}
    found = {each.name for each in SRC.iterdir() if each.is_dir() and not each.name.endswith(".egg-info")}
    assert found - {"__pycache__"} == {PACKAGE}


@pytest.mark.parametrize("room", ["harness", "benchmarks", "tests"])
def test_the_package_needs_nothing_that_is_not_in_the_wheel(room: str) -> None:
    found = [module.at(node) for module in modules() for node, name in imports(module) if name.split(".")[0] == room]
    assert not found


def test_a_module_that_no_page_leads_to_is_found(tmp_path: Path) -> None:
    room = tmp_path / "src" / PACKAGE / "testing"
    room.mkdir(parents=True)
    (room / "used.py").write_text(f"from {TESTING}.below import thing")
    (room / "below.py").write_text("thing = 1")
    (room / "ours.py").write_text(f"from {TESTING}.below import thing")
    files = {module.name: module for module in modules(tmp_path / "src")}
    assert files.keys() - reached({f"{TESTING}.used"}, files) == {f"{TESTING}.ours"}
