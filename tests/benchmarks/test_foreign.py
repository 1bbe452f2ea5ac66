"""The foreign peers: each is whole, and its environment is pinned; none is installed here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import environments, foreign
from benchmarks.__main__ import NAMES
from benchmarks.environments import HERE, NotInstalled, pins, versions
from benchmarks.llm import __main__ as llm
from benchmarks.peers.foreign import EVERY, FOREIGN
from tests.guards.tree import ROOT

PEERS = pytest.mark.parametrize("name", FOREIGN)
ENVIRONMENTS = pytest.mark.parametrize("name", sorted({peer.environment for peer in FOREIGN.values()}))
SAME = ("msgspec", "numpy", "uvloop")


def pinned(path: Path) -> dict[str, set[str]]:
    """The versions of each package in a file of pins; there may be several, for several Pythons."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==(\S+)", path.read_text(), re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


@PEERS
def test_peer_has_its_module_and_its_lines_in_the_readme(name: str):
    assert (ROOT / "benchmarks" / "peers" / f"{FOREIGN[name].module}.py").exists()
    assert f"- **{name}**" in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert set(FOREIGN[name].lacks) <= set(NAMES)


def test_names_are_those_of_workloads_and_peers():
    assert set(foreign.NAMES) <= set(NAMES)
    assert set(foreign.PEERS) <= set(EVERY)


@ENVIRONMENTS
def test_versions_are_pinned_with_hashes(name: str):
    text, found = pins(name).read_text(), pinned(pins(name))
    assert versions(name).items() <= {(package, *only) for package, only in found.items() if len(only) == 1}
    entries = re.split(r"\n(?=[A-Za-z0-9])", text)[1:]
    assert entries
    assert all("--hash=sha256:" in entry for entry in entries)


@ENVIRONMENTS
def test_what_every_peer_runs_on_has_the_versions_of_ours(name: str):
    here, ours = pinned(pins(name)), pinned(ROOT / "requirements.lock")
    assert {package: here[package] for package in SAME} == {package: ours[package] for package in SAME}


def test_every_environment_belongs_to_a_peer():
    of_models = set(llm.FOREIGN.values())
    assert {path.stem for path in HERE.glob("*.in")} == {peer.environment for peer in FOREIGN.values()} | of_models


def test_peer_that_cannot_be_installed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken.txt").write_text("not a requirement\n")
    monkeypatch.setattr(environments, "HERE", tmp_path)
    monkeypatch.setattr(environments, "PLACE", tmp_path / "made")
    with pytest.raises(NotInstalled) as caught:
        environments.make("broken")
    assert "broken.txt ended with status 1: " in str(caught.value)
    assert not (tmp_path / "made" / "broken" / ".installed").exists()
