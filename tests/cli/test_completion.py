"""Completion, in real shells: a person types the beginning of a word and presses the tab key."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.command import QUIET, Trd
from tests.cli.shell import Shell
from tests.guards.tree import SRC
from triton_distributed.cli.completion import endpoint_names, modules
from triton_distributed.cli.main import main
from triton_distributed.cli.why import request_ids

# How each shell starts without the user's own files, and what makes it load our completion.
SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], 'eval "$(trd completion bash)"'),
    "zsh": (["zsh", "-f", "-i"], 'autoload -U compinit && compinit -u && eval "$(trd completion zsh)"'),
    "fish": (["fish", "--no-config", "-i"], "trd completion fish | source"),
}


@pytest.fixture
def environment(tmp_path: Path, trd_dir: Path) -> dict[str, str]:
    """The variables of a shell with `trd` on its PATH and a home of its own."""
    program = tmp_path / "trd"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m triton_distributed.cli.main "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    home = {"HOME": str(tmp_path), "TERM": "dumb", "PS1": "> ", "LC_ALL": "C.UTF-8"}
    return {**os.environ, **QUIET, **home, "PATH": path, "PYTHONPATH": str(SRC)}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_tab_key(shell: str, trd: Trd, environment: dict[str, str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    command, load = SHELLS[shell]
    worker = trd.serve("worker:echo", "demo.backend.generate")
    terminal = Shell(command, environment)
    terminal.type(f"{load} && echo load''ed\r")
    terminal.until(lambda text: "loaded" in text)
    terminal.type("trd descr\t")
    terminal.until(lambda text: "describe" in text)
    terminal.type("demo.b\t")
    terminal.until(lambda text: "demo.backend.generate" in text)
    terminal.type("--js\t")
    terminal.until(lambda text: "--json" in text)
    terminal.type("\r")
    terminal.until(lambda text: f'"instance":"{worker.id}"' in text)
    terminal.type("\rexit\r")
    assert terminal.end()[0] == 0


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_can_be_parsed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "trd" in script
    if shutil.which(shell) is not None:
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_there_are_no_names_if_discovery_fails(trd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert endpoint_names() == []
    monkeypatch.setenv("TRD_DISCOVERY", "no such")
    assert endpoint_names() == []
    monkeypatch.setenv("TRD_DISCOVERY", "etcd")
    monkeypatch.setenv("ETCD_ENDPOINTS", "http://127.0.0.1:1")
    assert endpoint_names() == []
    assert logging.getLogger("triton_distributed").isEnabledFor(logging.ERROR)  # It is only quiet meanwhile.


def test_without_argcomplete(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["completion", "bash"]) == 1
    assert capsys.readouterr().err.endswith("needs argcomplete: pip install 'triton-distributed[cli]'\n")


def test_modules_and_requests(trd: Trd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("worker.py", "notes.txt", "not-a-module.py", "shop/__init__.py", "shop/orders.py", "data/x.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert modules("w") == ["shop", "worker"]
    assert modules("shop.") == ["shop.orders"]
    assert modules("nowhere.") == []
    trd.serve("worker:one_then_wait", "demo.b.g")
    calling = trd.start("call", "demo.b.g", "1")
    assert calling.line() == '"one"\n'
    assert request_ids() == [json.loads(trd.run("requests", "--json").out)["id"]]
    calling.signal(signal.SIGINT)
    calling.end()
