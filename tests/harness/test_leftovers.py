"""Processes that outlive the one that started them are found and killed."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest

from harness.leftovers import Leftovers
from harness.processes import ROOT, Child, ChildFailed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the descendants")
# A process that starts another one, prints its id and waits.
CHILD = """
import asyncio, subprocess
from harness.processes import answer_questions
process = subprocess.Popen(["sleep", "600"])
async def answer(question):
    return process.pid
asyncio.run(answer_questions(answer))
"""
PARENT = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True); input()"


@pytest.fixture
def parent():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=-1, stdout=-1, text=True) as process:
        yield process


def wait_until_ended(pidfd: int) -> bool:
    """A descriptor of a process becomes readable when the process ends."""
    return bool(select.select([pidfd], [], [], 10)[0])


def test_process_that_outlives_its_parent_is_killed(parent):
    pid = int(parent.stdout.readline())
    pidfd = os.pidfd_open(pid)
    left = Leftovers(parent.pid)
    left.look()
    parent.kill()
    parent.wait()
    assert left.kill() == [pid]
    assert wait_until_ended(pidfd)
    os.close(pidfd)
    assert left.kill() == []


def test_process_that_was_not_noted_is_left_alone(parent):
    pid = int(parent.stdout.readline())
    assert Leftovers(parent.pid).kill() == []
    os.kill(pid, signal.SIGTERM)  # This fails if it has ended.
    parent.kill()


async def test_child_takes_what_it_started_with_it(tmp_path, monkeypatch):
    (tmp_path / "parent.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROOT))))
    child = await Child.start("parent")
    pidfd = os.pidfd_open(await child.ask("pid"))
    await child.stop()
    assert wait_until_ended(pidfd)
    os.close(pidfd)


async def test_failure_tells_the_end_of_the_childs_log(tmp_path):
    with pytest.raises(ChildFailed) as caught:
        await Child.start("no_such_module", stderr=tmp_path / "log")
    text = str(caught.value)
    assert text.startswith("no_such_module ended with status 1; it logged: ")
    assert text.endswith("no_such_module")
