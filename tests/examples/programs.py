"""Runs the very programs under `examples/`, as somebody in a shell would."""

from __future__ import annotations

import asyncio
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.guards.tree import ROOT, SRC
from tests.timing import PATIENCE_S
from tests.warm import Forked, possible
from triton_distributed.config import Config
from triton_distributed.discovery.file.backend import FileDiscovery
from triton_distributed.discovery.table import EndpointTable
from triton_distributed.names import EndpointName

EXAMPLES = ROOT / "examples"

# A program that must not complain would report its own loop as stuck where the machine is too busy to run it.
QUIET = {"TRD_WATCHDOG_S": "5"}

# A program says so when the machine is too busy to start its server within some seconds, and a worker when it has
# refused a request because it is at capacity.
EXPECTED = r"no instance yet; waiting for a worker|refused, at capacity: "


class Program:
    """A program of the examples that is running.

    Args:
        path: below `examples/`.
        arguments: of its command line.
        prelude: a statement that is executed before it, in its process.
        environment: added to this process' own.
        served: run `trd serve` in the program's folder, instead of the program.

    Attributes:
        output: what it has printed and was read so far.
        handlers_raise: it is meant to say so, or that a worker was lost.
    """

    def __init__(
        self,
        path: str,
        *arguments: str,
        prelude: str = "",
        environment: dict[str, str] | None = None,
        served: bool = False,
    ):
        self.path = path
        self.output = ""
        self.handlers_raise = False
        script = EXAMPLES / path
        command = [str(script)]
        if prelude:
            run = f"import runpy, sys; sys.path.insert(0, {str(script.parent)!r}); {prelude}; "
            command = ["-c", f"{run}runpy.run_path({str(script)!r}, run_name='__main__')"]
        if served:
            command = ["-m", "triton_distributed.cli.main", "serve", script.stem]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in kill()
        self._deadline = time.monotonic() + PATIENCE_S
        env = {**os.environ, **QUIET, "PYTHONPATH": str(SRC), "PYTHONUNBUFFERED": "1", **(environment or {})}
        options: dict[str, Any] = {
            "cwd": script.parent if served else None,
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": self._errors,
            "env": env,
        }
        if possible(env) and not prelude and not served:
            self._process: subprocess.Popen[Any] = Forked(script, arguments, **options)
        else:
            self._process = subprocess.Popen([sys.executable, "-W", "error", *command, *arguments], **options)

    def until(self, pattern: str) -> str:
        """Read what it prints until the pattern is found in all of its output; returns that output."""
        self._deadline = time.monotonic() + PATIENCE_S
        while not re.search(pattern, self.output, re.MULTILINE):
            if not self._read():
                raise AssertionError(f"{self.path} ended without printing {pattern!r}\n{self._said()}")
        return self.output

    def end(self, status: int = 0) -> str:
        """Wait until it ends by itself, with this exit status; returns all that it has printed."""
        self._deadline = time.monotonic() + PATIENCE_S
        while self._read():
            pass
        got = self._process.wait(PATIENCE_S)
        lines = self._error_text().splitlines(keepends=True)
        errors = "".join(line for line in lines if not re.search(EXPECTED, line))
        assert got == status, f"{self.path} ended with exit status {got}, not {status}\n{self._said()}"
        told = self.handlers_raise and re.search("the handler raised|was lost with", errors)
        assert status or told or not errors, f"{self.path} ended well and yet had to complain\n{self._said()}"
        return self.output + errors

    def stop(self) -> str:
        """Send SIGTERM; it must end with status 0 and without a complaint."""
        self._process.send_signal(signal.SIGTERM)
        return self.end()

    def kill(self) -> None:
        """End it at once where it still runs, and release what belongs to it."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(PATIENCE_S)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()

    def _read(self) -> bool:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(max(0.0, self._deadline - time.monotonic())):
                raise AssertionError(f"{self.path} printed nothing further and did not end\n{self._said()}")
        data = os.read(self._process.stdout.fileno(), 65536)
        self.output += data.decode()
        self._deadline = time.monotonic() + PATIENCE_S  # it goes on
        return bool(data)

    def _error_text(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode()

    def _said(self) -> str:
        return f"--- stdout\n{self.output}\n--- stderr\n{self._error_text()}"


@contextmanager
def serving(
    path: str, *arguments: str, prelude: str = "", handlers_raise: bool = False, served: bool = False
) -> Iterator[Program]:
    """Run a server in the background; when the block is left it is stopped with SIGTERM and must take that well."""
    program = Program(path, *arguments, prelude=prelude, served=served)
    program.handlers_raise = handlers_raise
    try:
        yield program
        program.stop()
    finally:
        program.kill()


def run(
    path: str, *arguments: str, prelude: str = "", status: int = 0, environment: dict[str, str] | None = None
) -> list[str]:
    """Run a program to its end; returns the lines that it has printed."""
    program = Program(path, *arguments, prelude=prelude, environment=environment)
    try:
        return program.end(status).splitlines()
    finally:
        program.kill()


def wait_for_instances(namespace: str, component: str, endpoint: str, count: int) -> None:
    """Wait until discovery knows so many instances; fails when patience is over."""
    asyncio.run(_wait_for_instances(EndpointName(namespace, component, endpoint), count))


async def _wait_for_instances(name: EndpointName, count: int) -> None:
    table, enough = EndpointTable(name), asyncio.Event()

    def changed() -> None:
        if len(table.instances) == count:
            enough.set()

    table.listeners.append(changed)
    discovery = FileDiscovery(Config.from_env().directory)
    try:
        await discovery.watch(name, table.apply)
        async with asyncio.timeout(PATIENCE_S):
            await enough.wait()
    finally:
        await discovery.close()
