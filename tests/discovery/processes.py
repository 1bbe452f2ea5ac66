"""Starts `worker.py`, and lets a test talk to it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.warm import Forked, possible

WORKER = Path(__file__).with_name("worker.py")
ROOT = WORKER.parents[2]


class Worker:
    """A running one. Everything it reads and says goes through pipes."""

    def __init__(self, *arguments: object, forked: bool = True) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
        words = [str(each) for each in arguments]
        options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}
        self.process: subprocess.Popen[str]
        if forked and possible(env):
            self.process = Forked(WORKER, words, **options)
        else:
            self.process = subprocess.Popen([sys.executable, str(WORKER), *words], **options)
        self.pid = self.process.pid

    def hear(self) -> str:
        """The next line it says; empty when it and its children have ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def go(self) -> None:
        """Send the byte it waits for."""
        assert self.process.stdin is not None
        self.process.stdin.write("x")
        self.process.stdin.flush()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        """End it, and wait until nobody that it started holds its pipes any more."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.stdout.close()


@contextmanager
def worker(*arguments: object, forked: bool = True) -> Iterator[Worker]:
    """A worker that has said `ready`."""
    made = Worker(*arguments, forked=forked)
    try:
        lines = [made.hear()]
        while lines[-1] and lines[-1] != "ready":
            lines.append(made.hear())
        assert lines[-1] == "ready", lines
        yield made
    finally:
        made.end()
