"""Public is what `__all__` names, and each public object has one home."""

from __future__ import annotations

import ast
import importlib
import types
from pathlib import Path

import pytest

from tests.guards.tree import PACKAGE, Module, modules

# The alias under which programs written for the original import the runtime's classes, and the front door, which offers
# what most programs need under one name. The kit for FastAPI has all that the kit for Starlette has.
ALIASES = {PACKAGE, f"{PACKAGE}._core", f"{PACKAGE}.fastapi"}


def is_public_place(module: Module) -> bool:
    """A package's `__init__`, or a module right below the package; what is deeper is public through its package."""
    if module.path.name in ("__main__.py", "main.py"):
        return False
    return module.path.name == "__init__.py" or module.name.count(".") == 1


def declared(module: Module) -> list[str] | None:
    """The names of `__all__` as written, or None where there is none. It is a plain list of text, no computation."""
    if "__all__" not in module.text():
        return None
    for node in module.tree().body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            assert node.value is not None, f"{module.at(node)}: __all__ has no value"
            return list(ast.literal_eval(node.value))
    return None


def homes(places: dict[str, list[tuple[str, object]]]) -> list[str]:
    """Objects that more than one public place exports. `places`: module name to (public name, object)."""
    seen: dict[int, list[str]] = {}
    for place, objects in places.items():
        if place in ALIASES or place.startswith(f"{PACKAGE}.compat."):  # Faces for programs written for others.
            continue
        for name, value in objects:
            if isinstance(value, type | types.FunctionType | types.ModuleType):
                seen.setdefault(id(value), []).append(f"{place}.{name}")
    return [" and ".join(names) for names in seen.values() if len(names) > 1]


PLACES = [module for module in modules() if is_public_place(module)]


@pytest.mark.parametrize("module", PLACES, ids=lambda module: module.name)
def test_public_place_says_what_is_public(module: Module):
    names = declared(module)
    assert names is not None, f"{module.at(module.tree())}: needs __all__ (an empty one, if nothing in it is public)"
    assert names == sorted(set(names), key=_ruff_order), f"{module.name}.__all__ has doubles or is not sorted"
    loaded = importlib.import_module(module.name)
    missing = [name for name in names if not hasattr(loaded, name)]
    assert not missing, f"{module.name}.__all__ names {missing}, which it does not have"
    private = [name for name in names if name.startswith("_") and name != "__version__"]
    assert not private, f"{module.name}.__all__ names {private}, whose names say that they are private"


def _ruff_order(name: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then the rest, as `ruff` sorts `__all__`."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2), name


def test_each_public_object_has_one_home():
    places = {
        module.name: [(name, getattr(importlib.import_module(module.name), name)) for name in declared(module) or ()]
        for module in modules()
        if not module.path.name.startswith("__main__") and declared(module) is not None
    }
    assert homes(places) == []


def test_the_alias_module_adds_nothing_of_its_own():
    alias = importlib.import_module(f"{PACKAGE}._core")
    public = {f"{PACKAGE}.runtime", f"{PACKAGE}.llm"}
    homeless = [
        name
        for name in alias.__all__
        if not any(
            getattr(importlib.import_module(m.name), name, None) is getattr(alias, name)
            for m in PLACES
            if m.name in public
        )
    ]
    assert not homeless, f"{alias.__name__} exports {homeless}, which {sorted(public)} do not have"


def test_two_homes_are_found():
    class Thing:
        pass

    places: dict[str, list[tuple[str, object]]] = {
        "a": [("Thing", Thing)],
        "b": [("Other", Thing)],
        "c": [("LIMIT", 5)],
        "d": [("LIMIT", 5)],
    }
    assert homes(places) == ["a.Thing and b.Other"]


def test_the_alias_is_no_second_home():
    class Thing:
        pass

    assert homes({"a": [("Thing", Thing)], f"{PACKAGE}._core": [("Thing", Thing)]}) == []


@pytest.mark.parametrize(
    ("text", "names"), [("x = 1", None), ('__all__ = ["a"]', ["a"]), ("__all__: list[str] = []", [])]
)
def test_all_is_read_as_written(tmp_path: Path, text, names):
    path = tmp_path / "src" / PACKAGE / "thing.py"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert declared(Module(path, tmp_path / "src")) == names
