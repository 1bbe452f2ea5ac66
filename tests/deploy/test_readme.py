"""The commands of deploy/README.md that need no cluster are run; the manifests that the others name exist."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.files import DEPLOY
from tests.guards.tree import ROOT
from triton_distributed.cli.checks.certificates import sessions
from triton_distributed.config import Config

README = (DEPLOY / "README.md").read_text(encoding="utf-8")


def block(heading: str) -> list[str]:
    """The commands of the first block below a heading."""
    found = re.search(rf"^#+ {heading}\n.*?^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1].splitlines()


def run(lines: list[str], folder: Path) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, "TRD_DIR": str(folder)}
    command = ["sh", "-ec", "\n".join(lines)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here: the TLS files are not made")
def test_the_commands_make_tls_files_that_members_accept(tmp_path: Path) -> None:
    lines = block("TLS files")
    assert "trd doctor" in lines[-1]
    run(lines[:-1], tmp_path)
    names = dict(re.findall(r"TRD_(TLS_\w+)=(\S+)", lines[-1]))
    files: dict[str, Any] = {name.lower(): str(tmp_path / path) for name, path in names.items()}
    (found,) = sessions(Config(**files))
    assert found.level == "ok"
    assert "for 89 days" in found.text or "for 90 days" in found.text
    assert {stat.S_IMODE(each.stat().st_mode) for each in tmp_path.glob("*.key")} == {0o600}
    renewed = [each for each in lines if "tls.csr" in each]
    before = (tmp_path / "tls.crt").read_bytes()
    run(renewed, tmp_path)
    assert (tmp_path / "tls.crt").read_bytes() != before
    assert [each.level for each in sessions(Config(**files))] == ["ok"]


def test_the_rules_become_a_resource_of_the_operator() -> None:
    (line,) = [each for each in block("Metrics and alerts") if "PrometheusRule" in each]
    made = yaml.safe_load(run([line.partition(" | ")[0].replace("deploy/", f"{DEPLOY}/")], ROOT))
    assert (made["apiVersion"], made["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert made["spec"] == yaml.safe_load((DEPLOY / "grafana" / "alerts.yaml").read_text(encoding="utf-8"))


def test_named_files_exist() -> None:
    named = set(re.findall(r"deploy/[\w./@-]+\w", README)) | {
        f"deploy/{each}" for each in re.findall(r"^\| `([^`]+)`", README, re.M)
    }
    assert [each for each in named if not (ROOT / each).exists()] == []
