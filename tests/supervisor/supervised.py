"""A program with replicas as a process, and the lines that it writes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.guards.tree import SRC
from tests.timing import PATIENCE_S

WORKER = """
import asyncio, os, sys
from pathlib import Path
import triton_distributed as trd

@trd.serve("a.b.who")
async def who(request: object) -> tuple[str, int]:
    return os.environ["TRD_REPLICA"], os.getpid()

@trd.serve("a.b.gated")
def gated(fifo: str) -> str:
    print("begun", flush=True)
    Path(fifo).read_text()
    return "done"

if __name__ == "__main__":
    trd.run(processes=int(sys.argv[1]))
    print("ran")
"""


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: Iterable[int]) -> None:
    """Wait for the end of processes that are no children of this one, so only their ids tell it."""
    end = time.monotonic() + PATIENCE_S
    for pid in pids:
        while alive(pid):
            assert time.monotonic() < end, f"process {pid} still runs"
            time.sleep(0.01)


class Supervised:
    """A supervisor that runs, with its replicas.

    Attributes:
        lines: what it has written so far, in order; standard error with the rest.
    """

    def __init__(self, folder: Path, command: Iterable[str], environ: Mapping[str, str], **options: object) -> None:
        self.lines: list[str] = []
        self._read = 0
        self._more = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env={**os.environ, "TRD_WATCHDOG_S": "0", "PYTHONPATH": str(SRC), "PYTHONWARNINGS": "error", **environ},
        )
        self._thread = threading.Thread(target=self._copy)
        self._thread.start()

    def _copy(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._more:
                self.lines.append(line.rstrip("\n"))
                self._more.notify()
        with self._more:
            self.process.stdout.close()
            self._more.notify()

    def line(self, pattern: str) -> re.Match[str]:
        """The next line that matches as a whole, waited for. Lines before it are skipped."""
        assert self.process.stdout is not None
        with self._more:
            while True:
                for number in range(self._read, len(self.lines)):
                    if found := re.fullmatch(pattern, self.lines[number]):
                        self._read = number + 1
                        return found
                assert not self.process.stdout.closed, f"no line {pattern!r} in {self.lines}"
                assert self._more.wait(PATIENCE_S), f"no line {pattern!r} in {self.lines}"

    def ready(self, count: int) -> None:
        """Wait until all replicas can be called."""
        self.line(rf"ready: {count} replica\(s\)")

    def replicas(self) -> list[int]:
        """The process ids of the replicas, in the order of their starts."""
        pid = self.process.pid
        return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, status: int) -> None:
        """Wait until it has ended, with this status."""
        found = self.process.wait(PATIENCE_S)
        self._thread.join(PATIENCE_S)
        assert found == status, self.lines

    def stop(self, status: int = 0) -> None:
        """Send SIGTERM and wait for the end."""
        self.signal(signal.SIGTERM)
        self.end(status)

    def abandon(self) -> None:
        """Leave nothing, also after a failure."""
        if self.process.poll() is None:
            replicas = self.replicas()
            self.process.kill()
            for pid in replicas:
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._thread.join(PATIENCE_S)


@contextmanager
def supervised(folder: Path, *command: str, environ: Mapping[str, str] | None = None) -> Iterator[Supervised]:
    """Run a program with replicas.

    Args:
        command: Python's arguments.
        environ: added to the environment.
    """
    running = Supervised(folder, command, environ or {})
    try:
        yield running
    finally:
        running.abandon()


def written(folder: Path, code: str = WORKER, name: str = "worker.py") -> str:
    """Write a program; return its name."""
    (folder / name).write_text(code)
    return name
