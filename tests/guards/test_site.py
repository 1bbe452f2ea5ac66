"""The documentation's site: it has every page and every public name, builds strictly, and fetches nothing."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import triton_distributed
import triton_distributed.llm
import triton_distributed.llm.http
import triton_distributed.llm.replay
from tests.guards.tree import ROOT, modules

PLACES = (triton_distributed, triton_distributed.llm, triton_distributed.llm.http, triton_distributed.llm.replay)
SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
OUTSIDE = re.compile(
    r"<(?:script|img|iframe)[^>]* src=\"?(?:https?:)?//|<link[^>]* href=\"?(?:https?:)?//|url\((?:https?:)?//"
)


def pages(nav: Any) -> Iterator[str]:
    """The files that the navigation names."""
    if isinstance(nav, str):
        yield nav
    else:
        for each in nav.values() if isinstance(nav, dict) else nav:
            yield from pages(each)


def test_every_page_is_in_the_navigation():
    named = list(pages(SETTINGS["nav"]))
    assert len(named) == len(set(named))
    assert [each for each in named if not (ROOT / each).is_file()] == []
    missing = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")} - set(named)
    assert not missing, f"add {sorted(missing)} to the navigation in mkdocs.yml"


def test_every_public_name_is_in_the_reference():
    shown = [
        line.removeprefix("::: ").strip()
        for path in (ROOT / "docs/reference").glob("*.md")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("::: ")
    ]
    names = [(place, name) for place in PLACES for name in place.__all__ if name not in ("__version__", "FinishReason")]
    for place, name in names:
        module = getattr(place, name).__module__
        assert f"{module}.{name}" in shown or module in shown, f"docs/reference/ does not show {module}.{name}"


def test_each_error_of_a_docstring_has_a_description():
    """Else the site drops the line, and `mkdocs build --strict` fails."""
    found = []
    for module in modules():
        for node in ast.walk(module.tree()):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                section = (ast.get_docstring(node) or "").partition("\nRaises:\n")[2].partition("\n\n")[0]
                lines = re.findall(r"^    \S.*", section, re.MULTILINE)
                found += [
                    f"{module.at(node)}: {line.strip()}" for line in lines if not re.match(r"    [\w., ]+: ", line)
                ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path: Path):
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("the extra `docs` is not installed: `make docs` installs it and builds the site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    found = [
        f"{path.relative_to(tmp_path)}: {match[0]}"
        for path in (tmp_path / "site").rglob("*")
        if path.suffix in (".html", ".css")
        for match in OUTSIDE.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []
