"""Chaos runs of real processes: a good product passes, and each fault that is planted in one is found."""

from __future__ import annotations

import asyncio
import os
import re
import select
import shutil
import signal
import subprocess
import sys

import pytest

from harness.requests import Plan, Shape, Work, plans
from harness.runs.chaos import judged
from harness.worker import COMMAND
from tests.guards.tree import SRC
from tests.timing import MS, PATIENCE_S
from triton_distributed.errors import ConfigError
from triton_distributed.testing.chaos import FaultKind, schedule
from triton_distributed.testing.chaos.cluster import JOURNAL, ChaosCluster
from triton_distributed.testing.chaos.processes import WorkerEnded
from triton_distributed.testing.chaos.schedule import Fault

SETTLE_S = 1000 * MS  # here something is left, so all of it is waited for


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SRC), *filter(None, sys.path)]))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line, in a process that may have mounts of its own."""
    return subprocess.run(
        [sys.executable, "-m", "harness.runs.chaos", *arguments],
        capture_output=True, text=True, timeout=4 * PATIENCE_S,
    )  # fmt: skip


@pytest.mark.parametrize("options", [["--direct"], ["--network", "tls"]], ids=["unix", "tls through proxies"])
def test_a_short_run_of_every_kind_finds_nothing(options):
    said = run("--seed", "7", "--seconds", "5", "--faults-per-s", "3", *options)
    assert said.returncode == 0, said.stdout + said.stderr
    assert re.search(r"^faults +\d+: ", said.stdout, re.MULTILINE), said.stdout
    assert re.search(r"^requests +200: answered 1\d\d", said.stdout, re.MULTILINE), said.stdout
    assert "verdict     good" in said.stdout


def test_what_makes_no_sense_is_an_error():
    said = run("--kinds", "earthquake")
    assert (said.returncode, said.stdout) == (2, "")
    assert "--kinds='earthquake'" in said.stderr
    said = run("--network", "tcp", "--kinds", "corrupt")
    assert (said.returncode, said.stdout) == (2, "")
    assert 'network="tls"' in said.stderr


def calls(count: int = 24) -> list[Plan]:
    shapes = [Shape.STREAM, Shape.STREAM, Shape.ERROR]
    return [Plan(Work(id, shapes[id // 8 % 3], 4, 10), at_s=id * 0.01, timeout_s=PATIENCE_S) for id in range(count)]


async def report_of(plant: str, count: int = 24, workers: int = 2):
    """What a run finds with this planted in its workers."""
    part = f"tests.harness.faulty_worker:faulty:{plant}:{JOURNAL}"
    command = [sys.executable, "-m", "harness.member", "worker", part]
    async with ChaosCluster(command, workers=workers, proxied=False, settle_s=SETTLE_S) as cluster:
        return await judged(cluster, [], calls(count))


async def test_items_that_are_lost_doubled_swapped_or_invented_are_found():
    report = await report_of("spoilt")
    for words in (
        "request 1 (stream, 4 items): item 2 is [1, 3,",
        "request 1 (stream, 4 items): ended cleanly after 3 of 4 items",
        "request 2 (stream, 4 items): item 3 is [2, 2,",
        "request 2 (stream, 4 items): got an item too many",
        "request 3 (stream, 4 items): 2 handlers began it",
        "request 4 (stream, 4 items): item 0 is [4, 1,",
        "request 5 (stream, 4 items): got an item too many",
        "request 22 (error, 4 items): an error that its handler does not raise: RemoteError: RuntimeError",
    ):
        assert any(words in each for each in report.violations), "\n".join([words, "is not in", *report.violations])
    assert not any("request 0 " in each or "request 8 " in each for each in report.violations)
    assert "violations\n- request" in report.table()


async def test_what_a_worker_is_left_with_is_found():
    report = await report_of("leaks", workers=1)
    for words in ("1 fd more: /dev/zero", "1 thread more: leaked", "1 task more: Event.wait",
                  "a file is left in the folder of discovery: left-", "was never retrieved"):  # fmt: skip
        assert any(words in each for each in report.violations), "\n".join([words, "is not in", *report.violations])


async def test_a_worker_that_ends_by_itself_is_found():
    report = await report_of("ends")
    assert sum("ended by itself with 7" in each for each in report.violations) == 2, report.violations


async def test_an_exit_status_other_than_0_is_found():
    report = await report_of("dies_of_sigterm")
    assert sum("exited with 5 after SIGTERM" in each for each in report.violations) == 2, report.violations


async def test_what_the_caller_leaves_in_this_process_is_found():
    left = []

    async def make() -> None:
        left.append(os.open("/dev/zero", os.O_RDONLY))

    async with ChaosCluster(COMMAND, workers=1, proxied=False, settle_s=SETTLE_S) as cluster:
        report = await cluster.run([], make)
    os.close(left[0])
    assert report.violations == ["the client's process is left with 1 fd more: /dev/zero"]


async def test_what_the_calls_raise_is_raised():
    async def make() -> None:
        raise KeyError("of the caller")

    async with ChaosCluster(COMMAND, workers=1, proxied=False) as cluster:
        with pytest.raises(KeyError, match="of the caller"):
            await cluster.run([], make)


async def test_calls_that_never_end_are_told_and_cancelled():
    async with ChaosCluster(COMMAND, workers=1, proxied=False) as cluster:
        report = await cluster.run([], asyncio.Event().wait, patience_s=0.1)
    assert report.violations == ["0.1 s after everything was healed, some calls have not ended"]


async def test_a_worker_that_does_not_start_says_why():
    with pytest.raises(WorkerEnded, match=r"(?s)worker 0 .*has ended.*no such plant"):
        async with ChaosCluster([sys.executable, "-c", "raise SystemExit('no such plant')"], proxied=False):
            pass


@pytest.mark.parametrize(
    ("arguments", "fault", "says"),
    [
        ({"proxied": False}, FaultKind.CUT, "proxied=True"),
        ({"network": "tcp"}, FaultKind.CORRUPT, 'network="tls"'),
        ({"network": "unix"}, FaultKind.TRUNCATE, "Unix sockets lose no bytes"),
        ({}, FaultKind.DISK_FULL, "small_disk=True"),
    ],
)
async def test_a_fault_that_the_cluster_cannot_do_is_an_error(arguments, fault, says):
    async with ChaosCluster(COMMAND, workers=1, **arguments) as cluster:
        with pytest.raises(ConfigError, match=re.escape(says)):
            await cluster.run([Fault(0.0, fault, 0)], asyncio.Event().wait)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the end of the channel tells a worker, if it runs")
def test_no_worker_outlives_a_harness_that_is_killed(tmp_path):
    """Also one that is stopped, which reads nothing."""
    program = tmp_path / "run.py"
    program.write_text(
        "import asyncio, os, signal\n"
        "from harness.worker import COMMAND\n"
        "from triton_distributed.testing.chaos.cluster import ChaosCluster\n"
        "async def main():\n"
        "    async with ChaosCluster(COMMAND, workers=2) as cluster:\n"
        "        os.kill(cluster.pids[0], signal.SIGSTOP)\n"
        "        print(cluster.folder, *cluster.pids, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True) as harness:
        assert harness.stdout is not None
        folder, *pids = harness.stdout.readline().split()
        fds = [os.pidfd_open(int(pid)) for pid in pids]
        harness.send_signal(signal.SIGKILL)
    for fd in fds:
        assert select.select([fd], [], [], PATIENCE_S)[0], "a worker lives on"
        os.close(fd)
    shutil.rmtree(folder)


def test_the_same_seed_is_the_same_run():
    assert plans(5, duration_s=3, calls_per_s=10) == plans(5, duration_s=3, calls_per_s=10)
    assert schedule(5, duration_s=9, workers=3) == schedule(5, duration_s=9, workers=3)
