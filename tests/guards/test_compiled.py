"""The modules that mypyc compiles hold nothing that runs otherwise when it is compiled, without an error."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guards.tree import PACKAGE, ROOT, SRC

MODULES: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypyc"]["modules"]
each_module = pytest.mark.parametrize("path", MODULES)
# mypy reports what such a comment hides, and mypyc checks types when the code runs: the hidden error is a TypeError there.
CHECKED = {"arg-type", "assignment", "return-value"}


def parts(node: ast.AST, inside: type[ast.AST] | tuple[type[ast.AST], ...]) -> Iterator[ast.AST]:
    """The nodes below `node` that are of these types, without those of nested functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, inside):
            yield child
        yield from parts(child, inside)


WAITS = (ast.Await, ast.Yield, ast.YieldFrom, ast.AsyncFor, ast.AsyncWith)


def leaks(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Waiting while an exception is handled: compiled, all other tasks see that exception as their own meanwhile."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Try | ast.TryStar):
            for handler in node.handlers:
                for found in parts(handler, WAITS):
                    yield found.lineno, "waits in `except`: the exception leaks into other tasks; wait after the block"  # type: ignore[attr-defined]
            for statement in node.finalbody:
                found_here = [statement] if isinstance(statement, WAITS) else []
                for found in (*found_here, *parts(statement, WAITS)):
                    yield found.lineno, "waits in `finally`: the exception leaks into other tasks; wait after the block"  # type: ignore[attr-defined]


def blocks(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """`async with`: compiled, its end waits inside an `except`. That of `asyncio.timeout` does not wait."""
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncWith) and any("asyncio.timeout(" not in ast.unparse(each) for each in node.items):
            yield node.lineno, "`async with`: an exception in it leaks into other tasks; use `try` and wait after it"


def causes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """`raise … from …`: compiled, the cause is ignored."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.cause is not None:
            yield node.lineno, "`raise … from`: the cause would be ignored; write `raise caused(…, cause)`"


def options(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """`super().f(**…)`: compiled, the mapping is passed as the first of the arguments that it should be divided to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and any(each.arg is None for each in node.keywords):
            function = node.func
            if isinstance(function, ast.Attribute) and ast.unparse(function.value).startswith("super("):
                yield node.lineno, "`**` in a call of `super()`: compiled, it is passed as one argument; name them"


def numbers(tree: ast.Module) -> set[str]:
    """The names of a module whose values are numbers, texts or tuples: compiled, they have no identity."""
    return {
        name.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant | ast.BinOp | ast.Tuple)
        for name in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(name, ast.Name)
    }


def identities(tree: ast.Module, values: set[str]) -> Iterator[tuple[int, str]]:
    """`is` between numbers, texts or tuples."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(isinstance(each, ast.Is | ast.IsNot) for each in node.ops):
            for side in (node.left, *node.comparators):
                constant = isinstance(side, ast.Constant) and isinstance(side.value, int | float | str | bytes)
                named = isinstance(side, ast.Name) and side.id in values
                if isinstance(side, ast.Attribute) and isinstance(side.value, ast.Name):
                    named = side.attr in values and side.value.id.islower()  # A module's, not a member of an enum.
                if (constant and not isinstance(side.value, bool)) or named:  # type: ignore[attr-defined]
                    yield (
                        node.lineno,
                        "`is` between numbers, texts or tuples: compiled, equal ones are not identical; use `==`",
                    )


def ignored(text: str) -> Iterator[tuple[int, str]]:
    """Ignored errors of types that mypyc checks when the code runs."""
    for number, line in enumerate(text.splitlines(), 1):
        _, found, codes = line.partition("# type: ignore[")
        if found and CHECKED & set(codes.partition("]")[0].replace(" ", "").split(",")):
            yield number, "an ignored type error is a TypeError in the compiled build; change the annotation"


def faults(path: Path, values: set[str]) -> list[str]:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    own = {
        each.id for node in tree.body for each in ast.walk(node) if isinstance(each, ast.Name) and not each.col_offset
    }
    values = (values - own) | numbers(tree)  # Other modules may use a name of this one for something else.
    found = [*leaks(tree), *blocks(tree), *causes(tree), *identities(tree, values), *ignored(text), *options(tree)]
    return [f"{path.name}:{line}: {words}" for line, words in sorted(found)]


def known_values() -> set[str]:
    return set().union(*(numbers(ast.parse((SRC / PACKAGE / each).read_text(encoding="utf-8"))) for each in MODULES))


@each_module
def test_nothing_breaks_silently(path: str) -> None:
    assert faults(SRC / PACKAGE / path, known_values()) == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("async def f():\n    try: g()\n    except ValueError: await h()", "except"),
        ("async def f():\n    try: g()\n    finally:\n        await h()", "finally"),
        ("async def f():\n    try: g()\n    finally:\n        async for each in h(): pass", "finally"),
        ("def f():\n    try: g()\n    except ValueError as error: raise KeyError from error", "from"),
        ("async def f():\n    async with g(): pass", "async with"),
        ("class A(B):\n    def f(self, **given): super().f(1, **given)", "super"),
        ("LIMIT = 300\ndef f(x): return x is LIMIT", "is"),
        ("def f(x): return x is 300", "is"),
        ("PAIR = (1, 2)\ndef f(x): return x is not PAIR", "is"),
        ("x: int = f()  # type: ignore[assignment]", "TypeError"),
    ],
)
def test_what_breaks_silently_is_found(tmp_path: Path, code: str, words: str) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(code, encoding="utf-8")
    (fault,) = faults(path, numbers(ast.parse(code)))
    assert words in fault


def test_what_does_no_harm_passes(tmp_path: Path) -> None:
    path = tmp_path / "right.py"
    path.write_text(
        "NOTHING = None\n"
        "async def f(x):\n"
        "    try: await g()\n"
        "    except ValueError: failed = True\n"
        "    finally: h()\n"
        "    if failed and x is not None: await i()\n",
        encoding="utf-8",
    )
    assert faults(path, set()) == []
