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
from triton_distributed.cli.main import main
from triton_distributed.config import Config
from triton_distributed.errors import ConfigError
from triton_distributed.supervisor.process import Process
from triton_distributed.supervisor.replicas import Replicas
from triton_distributed.supervisor.shareable import check_shareable, has_fixed_address
from triton_distributed.supervisor.supervisor import Supervisor, supervise


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
    check_shareable(Replicas(2), Config(**settings))  # type: ignore[arg-type]


def test_one_process_may_have_a_fixed_address() -> None:
    check_shareable(Replicas(1), Config(listen="tcp://0.0.0.0:7000"))


def test_each_may_have_a_fixed_address_of_its_own() -> None:
    replicas = Replicas(2, env={"TRD_LISTEN": "tcp://0.0.0.0:700{replica}"})
    check_shareable(replicas, Config(listen="tcp://0.0.0.0:7000"))
    assert has_fixed_address(replicas, Config())
    with pytest.raises(ConfigError, match="2 processes cannot share an address"):
        check_shareable(Replicas(2, env={"TRD_LISTEN": "tcp://0.0.0.0:7000"}), Config())


def test_each_may_have_a_fixed_status_port_of_its_own() -> None:
    for port in ("940{replica}", "0", "-1", ""):
        check_shareable(Replicas(2, env={"TRD_STATUS_PORT": port}), Config(status_port=9400))
    check_shareable(Replicas(1, env={"TRD_STATUS_PORT": "9401"}), Config())
    with pytest.raises(ConfigError, match="2 processes cannot share a port: use 0, or one with {replica}"):
        check_shareable(Replicas(2, env={"TRD_STATUS_PORT": "9401"}), Config())


@pytest.mark.parametrize(
    ("settings", "fixed"),
    [({}, False), ({"listen": "tcp://0.0.0.0:0"}, False), ({"listen": "tcp://0.0.0.0:7000"}, True)],
)
def test_a_fixed_address_is_found(settings: dict[str, str], fixed: bool) -> None:
    assert has_fixed_address(Replicas(1), Config(**settings)) is fixed  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"count": 0}, ValueError, "count=0: it must be at least 1"),
        ({"count": "2"}, TypeError, "count is a number, not '2'"),
        ({"max_requests": 0}, ValueError, "max_requests=0: it must be at least 1"),
        ({"env": {"A": 1}}, TypeError, "env has texts, not 'A': 1"),
        ({"env": {"": "x"}}, ValueError, "is not a valid variable"),
        ({"env": {"A": "\0"}}, ValueError, "is not a valid variable"),
        ({"env": {"TRD_REPLICA": "7"}}, ValueError, "the supervisor itself sets TRD_REPLICA"),
    ],
)
def test_options_that_are_invalid(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Replicas(**{"count": 2, **options})


def test_the_number_of_requests_is_drawn_within_a_fifth() -> None:
    drawn = {Replicas(1, max_requests=100).limit() for _ in range(200)}
    assert drawn <= set(range(100, 121))
    assert len(drawn) > 3
    assert Replicas(1, max_requests=1).limit() == 1
    assert Replicas(1).limit() is None


def test_another_thread() -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            supervise(Replicas(2), Config())
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
    assert "this program is not in a file" in done.stderr.splitlines()[-1]


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


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--env", "TRD_REPLICA=1"], "the supervisor itself sets TRD_REPLICA"),
        (
            ["--env", "TRD_LISTEN=tcp://127.0.0.1:0", "--listen", "tcp://127.0.0.1:0"],
            "both say where to listen: give one",
        ),
    ],
)
def test_options_of_trd_serve_that_are_invalid(
    trd_dir: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    assert main(["serve", "worker", *options]) == 2
    assert says in capsys.readouterr().err


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
        return await Supervisor(Replicas(2), command, str(tmp_path), 30.0).run()

    with (
        asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner,
        pytest.raises(BlockingIOError, match="no more processes"),
    ):
        runner.run(main())
    assert [each.status for each in started] == [-signal.SIGKILL]
