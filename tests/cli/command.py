"""`trd` as a process, and what it said."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tests.guards.tree import SRC
from tests.timing import PATIENCE_S
from tests.warm import TRD, Forked, possible

PROGRAMS = Path(__file__).with_name("programs")

# Commands here must say nothing, also after they were stopped, or where the machine is too busy to run their loop.
QUIET = {"TRD_WATCHDOG_S": "0"}

READY = re.compile(r"ready: serving (\S+) as instance (\d+) at (\S+)\n")


# Tests that run beside this one may serve the same endpoints in folders of their own.
OTHER_FOLDERS = re.compile(r"; live instances are registered in .*?(?: looks there| a container\))")


def usual_environment() -> dict[str, str]:
    """The environment of a command."""
    return {**os.environ, **QUIET, "PYTHONPATH": str(SRC), "PYTHONWARNINGS": "error"}


@dataclass
class Said:
    """How a command ended."""

    status: int | None
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def complaint(self) -> str:
        """Standard error, but for where else on this machine something is served."""
        return OTHER_FOLDERS.sub("", self.err)


class Running:
    """A command that runs."""

    def __init__(
        self,
        arguments: tuple[str, ...],
        environment: Mapping[str, str],
        out: IO[str] | int = subprocess.PIPE,
        forked: bool = True,
    ) -> None:
        options: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": out,
            "stderr": subprocess.PIPE,
            "text": True,
            "encoding": "utf-8",
            "cwd": PROGRAMS,
            "env": {**usual_environment(), **environment},
        }
        if forked and possible(options["env"]):
            self.process: subprocess.Popen[str] = Forked(TRD, arguments, **options)
        else:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "triton_distributed.cli.main", *arguments], **options
            )
        self.out, self.err = self.process.stdout, self.process.stderr

    def line(self) -> str:
        """The next line on standard output, waited for; empty at its end."""
        assert self.out is not None
        return self.out.readline()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, stdin: str | None = None) -> Said:
        """Wait until it ends by itself."""
        try:
            out, err = self.process.communicate(stdin, timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return Said(self.process.returncode, out or "", err or "")

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        for pipe in (self.process.stdin, self.out, self.err):
            if pipe is not None:
                pipe.close()
        self.process.wait()


class Worker(Running):
    """A `trd serve` that can be called."""

    def wait_until_ready(self) -> None:
        line = self.line()
        found = READY.fullmatch(line)
        assert found, f"not a ready line: {line!r}\n{self.end().err if not line else ''}"
        self.endpoint, self.id, self.address = found[1], int(found[2]), found[3]

    def stop(self) -> Said:
        """SIGTERM, and what it said since the ready line or what was read of it."""
        self.signal(signal.SIGTERM)
        return self.end()


@dataclass
class Trd:
    """Starts commands in the folder of the test programs, and ends them with the test."""

    forked: bool = True
    started: list[Running] = field(default_factory=list)
    handlers_raise: bool = False  # and their workers say so

    def start(
        self, *arguments: str, env: Mapping[str, str] | None = None, out: IO[str] | int = subprocess.PIPE
    ) -> Running:
        self.started.append(running := Running(arguments, env or {}, out, self.forked))
        return running

    def run(
        self,
        *arguments: str,
        stdin: str | None = None,
        env: Mapping[str, str] | None = None,
        out: IO[str] | int = subprocess.PIPE,
    ) -> Said:
        """A command from its start to its end."""
        return self.start(*arguments, env=env, out=out).end(stdin)

    def serve(self, target: str, endpoint: str, *options: str, env: Mapping[str, str] | None = None) -> Worker:
        """A ready worker. If the test does not stop it, it must stop at the end with status 0, saying nothing."""
        worker = Worker(("serve", target, "--endpoint", endpoint, *options), env or {}, forked=self.forked)
        self.started.append(worker)
        worker.wait_until_ready()
        return worker

    def close(self) -> None:
        workers = [each for each in self.started if isinstance(each, Worker) and each.process.poll() is None]
        for each in workers:
            each.signal(signal.SIGTERM)
        ends = [each.end() for each in workers]
        self.abandon()
        said = [end.err for end in ends if end.err and not (self.handlers_raise and "the handler raised" in end.err)]
        status = [end.status for end in ends]
        assert (status, said) == ([0] * len(ends), []), f"workers ended with {status} and said: {said}"

    def abandon(self) -> None:
        for each in self.started:
            each.kill()
