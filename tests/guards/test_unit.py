"""`make unit` runs what needs no server, no network and no event loop; CONTRIBUTING.md names tests that exist."""

from __future__ import annotations

import re

import pytest

from tests.guards.tree import MAKEFILE, ROOT

_, _, RULE = MAKEFILE.partition("\nUNIT = ")
WORDS = RULE.replace("\\\n", " ").splitlines()[0]


def paths() -> list[str]:
    plain, _, guards = WORDS.partition("$(addprefix tests/guards/test_,")
    return plain.split() + [f"tests/guards/test_{each}" for each in guards.rstrip(")").split()]


@pytest.mark.parametrize("path", paths())
def test_it_is_there_and_has_no_loop_and_no_server(path: str) -> None:
    found = ROOT / path
    files = sorted(found.glob("test_*.py")) if found.is_dir() else [found]
    assert files
    for each in files:
        text = each.read_text(encoding="utf-8")
        assert not re.search(r"async def test_|\bCluster\b|\b(?:etcd|nats)\w*: (?:Etcd|Nats)", text), each


def test_it_holds_the_pure_rooms() -> None:
    assert {"tests/wire", "tests/payload", "tests/routing"} <= set(paths())


def test_the_table_of_what_to_run_names_what_exists() -> None:
    table = "\n".join(re.findall(r"^\|.*$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE))
    named = re.findall(r"\btests/[\w/.]+", table)
    assert len(named) > 10
    assert [each for each in named if not (ROOT / each).exists()] == []
