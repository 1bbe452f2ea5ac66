"""What cannot be replicated is refused before a process starts."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import triton_distributed as trd
from triton_distributed.config import Config
from triton_distributed.errors import ConfigError
from triton_distributed.supervisor.process import Process
from triton_distributed.supervisor.supervisor import Supervisor, check_shareable, supervise


@trd.serve("a.b.c")
async def handler(request: int) -> int:
    return request


@pytest.mark.parametrize("number", [0, -1])
def test_less_than_one_process(number: int) -> None:
    with pytest.raises(ValueError, match=rf"run\(\): processes={number}: it must be at least 1"):
        trd.run(handler, processes=number)


@pytest.mark.parametrize("number", ["2", 2.0, True])
def test_not_a_number_of_processes(number: object) -> None:
    with pytest.raises(TypeError, match=r"run\(\): processes is a number, not"):
        trd.run(handler, processes=number)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"listen": "tcp://0.0.0.0:7000"}, "use port 0: tcp://0.0.0.0:0"),
        ({"listen": "tcp://127.0.0.1:0, tcp://[::1]:7000"}, "2 processes cannot share an address: use port 0"),
        ({"listen": "unix:///run/worker.sock"}, "2 processes cannot share an address: remove it"),
        ({"advertise": "tcp://10.0.0.5:7000"}, "TRD_ADVERTISE"),
        ({"discovery": "static", "static": "a.b.c=tcp://127.0.0.1:7000"}, "cannot share the addresses of one worker"),
        ({"discovery": "memory"}, "processes do not share memory: use file or etcd"),
    ],
)
def test_settings_that_two_processes_cannot_share(settings: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        trd.run(handler, config=Config(**settings), processes=2)  # type: ignore[arg-type]
    assert says in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"listen": "tcp://0.0.0.0:0"},
        {"listen": "tcp://0.0.0.0:0", "advertise": "worker.example"},
        {"advertise": "tcp://worker.example:0"},
        {},
    ],
)
def test_settings_that_two_processes_can_share(settings: dict[str, str]) -> None:
    check_shareable(2, Config(**settings))  # type: ignore[arg-type]


def test_one_process_may_have_a_fixed_address() -> None:
    check_shareable(1, Config(listen="tcp://0.0.0.0:7000"))


def test_another_thread() -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            supervise(2, Config())
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "only the main thread gets signals" in str(errors[0])


def test_a_program_from_standard_input(tmp_path: Path) -> None:
    code = """
import triton_distributed as trd
@trd.serve("a.b.c")
async def handler(request: int) -> int:
    return request
trd.run(processes=2)
"""
    done = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "this one is not in a file" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("number", ["0", "-1", "many"])
def test_the_option(trd_dir: Path, number: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "triton_distributed.cli.main", "serve", "worker", f"--replicas={number}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "is not a whole number of at least 1" in done.stderr


def test_a_process_that_the_system_refuses_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Process] = []

    def start(index: int, *arguments: Any) -> Process:
        if index == 1:
            raise BlockingIOError("no more processes")
        started.append(process := Process(index, *arguments))
        return process

    monkeypatch.setattr("triton_distributed.supervisor.supervisor.Process", start)
    command = [sys.executable, "-c", "import time\nwhile True: time.sleep(0.05)"]

    async def main() -> int:
        return await Supervisor(2, command, str(tmp_path), 30.0).run()

    with (
        asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner,
        pytest.raises(BlockingIOError, match="no more processes"),
    ):
        runner.run(main())
    assert [each.over.result() for each in started] == [-signal.SIGKILL]
