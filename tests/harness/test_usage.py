"""Processor time and peak memory of other processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from harness.usage import Usage, descendants

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak and the descendants")
PROGRAM = """
import sys, time
for line in sys.stdin:
    if line == "memory\\n":
        del [bytearray(100 << 20)][:]
    else:
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass
    print("done", flush=True)
"""


@pytest.fixture
def child():
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=-1, stdout=-1, text=True) as process:
        yield process


def do(child: subprocess.Popen[str], what: str) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(f"{what}\n")
    child.stdin.flush()
    assert child.stdout.readline() == "done\n"


def test_usage_counts_the_processor_time_of_another_process(child):
    do(child, "memory")
    usage = Usage([child.pid])
    assert usage.cpu_s() < 0.05
    do(child, "work")
    assert usage.cpu_s() >= 0.05


def test_peak_is_that_of_the_measurement_and_not_of_the_time_before(child):
    do(child, "memory")
    usage = Usage([child.pid])
    quiet = usage.peak_mib()
    do(child, "memory")
    peak = usage.peak_mib()
    assert quiet is not None
    assert peak is not None
    assert peak >= quiet + 90


def test_process_that_has_ended_counts_for_nothing(child):
    usage = Usage([child.pid])
    child.kill()
    child.wait()
    assert usage.cpu_s() == 0
    assert usage.peak_mib() is None
    assert Usage([child.pid]).peak_mib() is None


def test_descendants_are_the_children_and_theirs(child):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "1\n"
        assert len(descendants(parent.pid)) == 1
        assert {child.pid, parent.pid, *descendants(parent.pid)} <= set(descendants(os.getpid()))
        assert parent.stdin is not None
        parent.stdin.write("\n")
