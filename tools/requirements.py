"""Prints what to install, as a requirements file for pip or uv.

    tools/requirements.py locked dev,examples   exact versions with hashes, out of requirements.lock
    tools/requirements.py newest dev,examples   the ranges of pyproject.toml: the installer takes the newest
    tools/requirements.py oldest dev,examples   the lower bounds of pyproject.toml as exact versions

The second argument names extras or dependency groups of pyproject.toml, with commas between them. "" is the package
alone, `build` is what building the package takes, `all` is all extras but `transformers`, and `build`.

Needs Python 3.11 and nothing else, since it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

OWN_LOCK = "transformers"
"""The extra that `all` leaves out: torch is large, and `make test-transformers` alone needs it."""

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"


def key(requirement: str) -> str:
    """The normalised name of the package that a requirement asks for."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    if found is None:
        raise SystemExit(f"error: {requirement!r} does not begin with the name of a package")
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def declared(parts: str) -> list[str]:
    """The requirements of these extras or groups, as pyproject.toml has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    build, groups = project["build-system"]["requires"], project["dependency-groups"]
    core, extras = project["project"]["dependencies"], project["project"]["optional-dependencies"]
    found: list[str] = []
    names = [*(each for each in extras if each != OWN_LOCK), "build"] if parts == "all" else parts.split(",")
    for name in names:
        if name == "build":
            found += build
        elif name in groups:
            found += groups[name]
        elif name in extras or not name:
            found += core + (extras[name] if name else [])
        else:
            raise SystemExit(f"error: pyproject.toml has neither an extra nor a group {name!r}")
    return list(dict.fromkeys(found))


def oldest(requirement: str) -> str:
    """The requirement with its lower bound as the only version: `a[b]>=1,<2; c` becomes `a[b]==1; c`."""
    wanted, separator, marker = requirement.partition(";")
    bound = re.search(r"[>=]=\s*([^,\s]+)", wanted)
    if bound is None:
        raise SystemExit(f"error: {requirement!r} has no lower bound")
    return wanted[: bound.start()].strip() + "==" + bound[1] + (f"; {marker.strip()}" if separator else "")


def locked(wanted: list[str]) -> list[str]:
    """The entries of the lock for these requirements and for all that they need.

    Below each entry uv notes the packages that need it (`# via`). An entry is taken if it is wanted, or if a taken one
    needs it.
    """
    entries: dict[str, list[str]] = {}
    needs: dict[str, set[str]] = {}
    for block in re.split(r"\n(?=[A-Za-z0-9])", LOCK.read_text(encoding="utf-8")):
        lines = block.splitlines()
        if not lines or lines[0].startswith("#"):
            continue
        name = key(lines[0])
        entries.setdefault(name, []).append("\n".join(line for line in lines if not line.lstrip().startswith("#")))
        for line in lines:
            if asked := re.fullmatch(r"\s+#\s+(?:via\s+)?(?!via$)([A-Za-z0-9._-]+)", line):
                needs.setdefault(key(asked[1]), set()).add(name)
    rest = [key(each) for each in wanted]
    taken: set[str] = set()
    while rest:
        name = rest.pop()
        if name in taken:
            continue
        if name not in entries:
            raise SystemExit(f"error: {LOCK.name} does not have {name}; `make lock` renews it")
        taken.add(name)
        rest += needs.get(name, ())
    return [entry for name in sorted(taken) for entry in entries[name]]


def main(arguments: list[str]) -> None:
    if len(arguments) != 2 or arguments[0] not in ("locked", "newest", "oldest"):
        raise SystemExit(f"usage: tools/requirements.py locked|newest|oldest PARTS, not {arguments}")
    which, parts = arguments
    found = declared(parts)
    if which == "locked":
        found = locked(found)
    elif which == "oldest":
        found = [oldest(each) for each in found]
    print("\n".join(found))


if __name__ == "__main__":
    main(sys.argv[1:])
