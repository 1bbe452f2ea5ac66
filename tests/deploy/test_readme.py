"""The commands of deploy/README.md that need no cluster are run; the manifests that the others name exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.files import DEPLOY, container, manifest, unit
from tests.deploy.programs import check
from tests.guards.tree import ROOT
from triton_distributed.cli.checks.certificates import sessions
from triton_distributed.config import Config

README = (DEPLOY / "README.md").read_text(encoding="utf-8")


NAMESPACE = "triton-distributed"


def block(heading: str, begin: str = "") -> list[str]:
    """The commands of the first block below a heading, or of the first that begins so."""
    found = re.search(rf"^#+ {heading}\n.*?^```sh\n({begin}.*?)^```", README, re.MULTILINE | re.DOTALL)
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


def test_trd_runs_beside_a_unit_with_its_user_and_settings() -> None:
    (line,) = block("systemd", "systemd-run")
    words = shlex.split(line)
    options = [each.partition("=")[::2] for each in words if each.startswith("--") and "=" in each]
    service = unit()["Service"]
    (program,) = [each for each in words if each.endswith("/trd")]
    assert service["ExecStart"].split()[0] == program
    check(words[words.index(program) :])
    assert dict(options)["--uid"] == service["User"]
    assert dict(options)["--gid"] == service["Group"]
    (file,) = [value.removeprefix("EnvironmentFile=") for name, value in options if name == "--property"]
    assert file.replace("hello", "%i") in service["EnvironmentFile"].split()
    assert dict(options)["--setenv"] in service["Environment"].split()


def test_trd_runs_in_a_pod_whose_status_port_can_be_forwarded() -> None:
    *inside, forward = block("Look inside")
    for line in inside:
        check(shlex.split(line.partition(" -- ")[2]))
    port = shlex.split(forward, comments=True)[-1]
    (status,) = [each for each in container(manifest("Deployment", "worker"))["ports"] if each["name"] == "status"]
    assert str(status["containerPort"]) == port
    assert [
        each for each in (*inside, forward) if f" {NAMESPACE} " not in each or " deployment/worker " not in each
    ] == []


def test_named_files_exist() -> None:
    named = set(re.findall(r"deploy/[\w./@-]+\w", README)) | {
        f"deploy/{each}" for each in re.findall(r"^\| `([^`]+)`", README, re.M)
    }
    assert [each for each in named if not (ROOT / each).exists()] == []
