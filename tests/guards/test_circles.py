"""No files import each other in a circle. Imports for type checkers count: objects that know each other's types are tied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.guards.tree import PACKAGE, ROOT, SRC, imports, modules

# Rooms that still have a circle. This list only shrinks: a room without one has to leave it.
KNOWN: set[str] = set()


def circles(root: Path = SRC, package: str = PACKAGE) -> list[list[str]]:
    """Each set of files in which every file imports every other one, directly or through others of the set."""
    files = {module.name: module for module in modules(root, package) if module.path.name != "__init__.py"}
    graph = {name: {_file(used, files) for _, used in imports(module)} & files.keys() for name, module in files.items()}
    reached = {name: _reached(name, graph) for name in files}
    found = {frozenset({m for m in reached[n] if n in reached[m]}) for n in files if n in reached[n]}
    return sorted(sorted(each) for each in found)


def _file(name: str, files: Mapping[str, object]) -> str:
    """The file that holds `name`, which may be a class or function of the file."""
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name


def _reached(start: str, graph: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    todo = [start]
    while todo:
        new = graph[todo.pop()] - found
        found |= new
        todo.extend(new)
    return found


def test_no_files_import_each_other_in_a_circle() -> None:
    found = circles()
    rooms = {name.split(".")[1] for each in found for name in each}
    words = "\n".join(", ".join(each) for each in found)
    assert rooms - KNOWN == set(), (
        f"let the lower file own a small Protocol for what it needs of the upper one:\n{words}"
    )
    assert KNOWN - rooms == set(), "these rooms have no circle any more: take them from KNOWN"


def test_no_files_of_the_harness_import_each_other_in_a_circle() -> None:
    assert circles(ROOT, "harness") == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    room = tmp_path / "src" / PACKAGE / "wire"
    room.mkdir(parents=True)
    (room / "one.py").write_text(f"from {PACKAGE}.wire.two import Two")
    (room / "two.py").write_text(
        f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {PACKAGE}.wire import three"
    )
    (room / "three.py").write_text("from .one import One")
    (room / "four.py").write_text("from .one import One")
    names = [f"{PACKAGE}.wire.{each}" for each in ("one", "three", "two")]
    assert circles(tmp_path / "src") == [names]
