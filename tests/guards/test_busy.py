"""`tools/busy.py`, on which `make test-busy` stands, leaves no busy process behind, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.guards.tree import ROOT
from tests.timing import PATIENCE_S

# Writes the process ids of its parent's children, then ends with the status that it is given, or waits.
COMMAND = """
import os, subprocess, sys, time
rows = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout.splitlines()
with open(sys.argv[1] + "~", "w") as file:
    print(*(pid for pid, parent in map(str.split, rows) if int(parent) == os.getppid()), file=file)
os.rename(sys.argv[1] + "~", sys.argv[1])
if sys.argv[2] == "wait":
    time.sleep(600)
sys.exit(int(sys.argv[2]))
"""


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("ends", "status"),
    [("0", 0), ("3", 1), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 128 + signal.SIGINT)],
)
def test_no_busy_process_is_left(ends: str | signal.Signals, status: int, tmp_path: Path) -> None:
    file = tmp_path / "children"
    how = ends if isinstance(ends, str) else "wait"
    command = [sys.executable, "-c", COMMAND, str(file), how]
    with subprocess.Popen(
        [sys.executable, str(ROOT / "tools/busy.py"), "1", *command], stdout=subprocess.PIPE, text=True
    ) as busy:
        until = time.monotonic() + PATIENCE_S
        while not file.exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        if not isinstance(ends, str):
            busy.send_signal(ends)
        said, _ = busy.communicate(timeout=PATIENCE_S)
    assert busy.returncode == status
    assert "== 4 busy processes on " in said
    assert ("run 1: status" in said) is isinstance(ends, str)
    children = list(map(int, file.read_text().split()))
    assert len(children) == 5  # the busy ones and the command
    assert not any(map(runs, children))
