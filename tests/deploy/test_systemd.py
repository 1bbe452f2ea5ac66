"""The systemd unit: systemd's own reading of it where it is installed, and what it must say."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.command import READY, Running
from tests.deploy.files import ENVIRONMENT, OURS, SETTINGS, UNIT, environment_file, seconds, unit
from tests.deploy.programs import check, settings
from tests.guards.tree import SRC
from triton_distributed.config import Config

MODULE = """
import triton_distributed as trd


@trd.serve("demo.shop.order")
async def order(item: str) -> str:
    return item


async def generate(request):
    yield request
"""

ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="no systemd-analyze here: only our own reading is tested")


def commands() -> list[str]:
    """What the example sets `WORKER` to, and what its comments offer instead."""
    return re.findall(r"^(?:# )?WORKER=(.*)$", ENVIRONMENT.read_text(encoding="utf-8"), re.MULTILINE)


def expanded(worker: str) -> list[str]:
    """The command line as systemd makes it: `${NAME}` is one word, `$NAME` as many as it holds."""
    variables = {**environment_file(ENVIRONMENT), "WORKER": worker}
    words: list[str] = []
    for word in unit()["Service"]["ExecStart"].split():
        if whole := re.fullmatch(r"\$\{(\w+)\}", word):
            words.append(variables[whole[1]])
        elif split := re.fullmatch(r"\$(\w+)", word):
            words += shlex.split(variables[split[1]])
        else:
            words.append(word)
    return words


@pytest.mark.parametrize("worker", commands())
def test_the_command_is_one_that_trd_takes(worker: str):
    check(expanded(worker))


@pytest.mark.parametrize(
    ("worker", "endpoint"), list(zip(commands(), ("demo.shop.order", "demo.backend.generate"), strict=False))
)
def test_the_command_serves(worker: str, endpoint: str, trd_dir: Path, tmp_path: Path):
    (tmp_path / "my_module.py").write_text(MODULE, encoding="utf-8")
    _, *arguments = expanded(worker)
    running = Running(tuple(arguments), {"TRD_DIR": str(trd_dir), "PYTHONPATH": f"{SRC}:{tmp_path}"})
    try:
        ready = READY.fullmatch(running.line())
        assert ready
        assert ready[1] == endpoint
    finally:
        running.signal(signal.SIGTERM)
        assert running.end().status == 0


def test_the_environment_file_holds_settings_that_exist():
    variables = environment_file(ENVIRONMENT)
    assert {each for each in variables if OURS.match(each)} <= SETTINGS
    used = set(re.findall(r"\$\{?(\w+)", unit()["Service"]["ExecStart"]))
    assert {each for each in variables if not OURS.match(each)} == used
    assert settings(variables).discovery == "etcd"
    fixed = dict(each.split("=", 1) for each in unit()["Service"]["Environment"].split())
    assert {each for each in fixed if OURS.match(each)} <= SETTINGS
    assert fixed["TRD_DIR"] == f"/run/{unit()['Service']['RuntimeDirectory']}"


def test_a_worker_may_drain_and_comes_back_when_it_fails():
    service = unit()["Service"]
    assert service["KillSignal"] == "SIGTERM"
    assert seconds(service["TimeoutStopSec"]) > Config().drain_timeout_s
    assert seconds(service["TimeoutStopSec"]) > settings(environment_file(ENVIRONMENT)).drain_timeout_s
    assert service["Restart"] == "on-failure"


def test_it_reads_one_environment_file_an_instance():
    assert "/etc/triton-distributed/%i.env" in unit()["Service"]["EnvironmentFile"].split()
    assert UNIT.name.endswith("@.service")


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The unit with this environment's own program, because systemd looks whether there is one."""
    text = UNIT.read_text(encoding="utf-8")
    program = unit()["Service"]["ExecStart"].split()[0]
    path = tmp_path / UNIT.name
    path.write_text(text.replace(program, sys.executable).replace("WorkingDirectory=/opt/triton-distributed", ""))
    return path


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert ANALYZE
    command = [ANALYZE, "--no-pager", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "SYSTEMD_COLORS": "0"})


@needs_systemd
def test_systemd_takes_it(installed: Path):
    done = analyze("verify", str(installed.with_name("worker@hello.service")), str(installed))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_systemd
def test_systemd_would_find_a_mistake(installed: Path):
    installed.write_text(installed.read_text().replace("TimeoutStopSec=", "TimeoutStopSecs="))
    assert "TimeoutStopSecs" in analyze("verify", str(installed.with_name("worker@hello.service"))).stderr


@needs_systemd
def test_systemd_finds_it_well_confined(installed: Path):
    done = analyze("security", "--offline=yes", "--threshold=30", str(installed))
    if "unrecognized option" in done.stderr or "nknown option" in done.stderr:
        pytest.skip("this systemd-analyze rates no unit offline: it is older than 250")
    assert done.returncode == 0, done.stdout + done.stderr
