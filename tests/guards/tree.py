"""The project's own files, as the guards read them."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src"
PACKAGE = "triton_distributed"
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Module:
    """One file of the package."""

    path: Path
    root: Path = SRC

    @property
    def name(self) -> str:
        """Its dotted name: `triton_distributed.wire.frames`; a package's `__init__` has the package's own."""
        parts = list(self.path.relative_to(self.root).with_suffix("").parts)
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def room(self) -> str:
        """The part below the package that decides what it may import: `wire`, `errors`; "" for the package itself."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 else ""

    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def tree(self) -> ast.Module:
        return ast.parse(self.text(), str(self.path))

    def at(self, node: ast.AST) -> str:
        """`file:line`, as an editor opens it."""
        return f"{self.path.relative_to(self.root.parent)}:{getattr(node, 'lineno', 1)}"


def modules(root: Path = SRC, package: str = PACKAGE) -> list[Module]:
    """Every file of a package."""
    return [Module(path, root) for path in sorted((root / package).rglob("*.py"))]


@functools.cache  # Several guards read the same files.
def imports(module: Module) -> tuple[tuple[ast.stmt, str], ...]:
    """Each import statement of a file with the full dotted name that it takes, `from x import y` as `x.y`."""
    return tuple(_imports(module))


def _imports(module: Module) -> Iterator[tuple[ast.stmt, str]]:
    for node in ast.walk(module.tree()):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.name.split(".")
                package = parts if module.path.name == "__init__.py" else parts[:-1]
                base = ".".join(package[: len(package) - node.level + 1] + ([base] if base else []))
            for alias in node.names:
                yield node, f"{base}.{alias.name}"


def supported_pythons() -> list[str]:
    """The Python versions that pyproject.toml says this package is for: `3.11`, …"""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", each) for each in project["classifiers"]]
    return [each[1] for each in found if each]


@functools.cache
def project_files() -> tuple[Path, ...]:
    """What is or would be committed: all files that git tracks or does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return tuple(path for name in listed.split("\0") if name and (path := ROOT / name).is_file())
