"""Every program and command in README and docs runs and answers as the text says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guards import documents
from tests.guards.tree import ROOT
from tests.servers import missing
from triton_distributed.testing import ServerMissing

README = ROOT / "README.md"
EXECUTED = [README, *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [
    *EXECUTED,
    *(
        ROOT / name
        for name in (
            "ARCHITECTURE.md",
            "CONTRIBUTING.md",
            "CHANGELOG.md",
            "deploy/README.md",
            "harness/README.md",
            "benchmarks/README.md",
        )
    ),
]


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.leaves("socket files", reason="README kills a worker, whose socket the next worker or caller removes")
@pytest.mark.timeout(900)  # a whole document; each of its commands has a limit of its own
@pytest.mark.parametrize("path", EXECUTED, ids=short)
def test_document_is_true(path: Path, trd_dir: Path, tmp_path: Path):
    try:
        programs = documents.run(path, tmp_path)
    except ServerMissing as error:
        missing(error)
    assert programs or path != README, (
        "README.md shows no program: its first screen has a worker, a client and two commands"
    )


@pytest.mark.parametrize("path", LINKED, ids=short)
def test_links_lead_somewhere(path: Path):
    assert documents.broken_links(path) == []
