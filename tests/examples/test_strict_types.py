"""The native examples pass mypy --strict and basedpyright's strict mode, without a cast or an ignored line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.programs import EXAMPLES
from tests.guards.tree import ROOT, SRC

NATIVE = sorted(
    {path.parent for path in EXAMPLES.rglob("*.py") if "import triton_distributed as trd" in path.read_text()}
)
ESCAPES = re.compile(r"\bcast\(|# (?:type|pyright): ignore|\bAny\b")


def test_there_is_no_escape():
    assert len(NATIVE) >= 2
    found = [str(path) for folder in NATIVE for path in folder.glob("*.py") if ESCAPES.search(path.read_text())]
    assert not found


@pytest.mark.slow
@pytest.mark.parametrize("folder", NATIVE, ids=lambda path: path.name)
def test_mypy(folder: Path, tmp_path: Path):
    checked = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--config-file=",
            f"--cache-dir={ROOT / '.mypy_cache/examples'}",
            *folder.glob("*.py"),
        ],
        cwd=folder,
        env={"MYPYPATH": str(SRC)},
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.slow
def test_basedpyright(tmp_path: Path):
    pytest.importorskip("basedpyright", reason="the extra `types` is not installed")
    settings = {
        "include": [str(each) for each in NATIVE],
        "executionEnvironments": [{"root": str(each), "extraPaths": [str(SRC)]} for each in NATIVE],
        "typeCheckingMode": "strict",
        "pythonVersion": "3.11",
    }
    project = tmp_path / "pyrightconfig.json"
    project.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "-p", str(project), "--pythonpath", sys.executable]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
