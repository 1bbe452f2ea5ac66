"""`trd watch`, through a terminal as people use it, and as JSON lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.cli.command import PROGRAMS, QUIET, Trd
from tests.cli.shell import Shell
from tests.guards.tree import SRC
from tests.timing import PATIENCE_S
from triton_distributed.cli.health import PAUSED


@contextmanager
def pausing() -> Iterator[Any]:
    """A worker that pauses all its endpoints when it is told to; yields a function that tells it."""
    process = subprocess.Popen(
        [sys.executable, "pausing.py"],
        cwd=PROGRAMS,
        env={**os.environ, **QUIET, "PYTHONPATH": str(SRC)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None
    assert stdout.readline().startswith("ready")

    def tell(word: str) -> None:
        stdin.write(f"{word}\n")
        stdin.flush()
        assert stdout.readline() == "done\n"

    try:
        yield tell
    finally:
        stdin.close()
        process.wait()
        stdout.close()


@pytest.mark.leaves("socket files", reason="SIGKILL ends the worker without cleaning up")
def test_on_a_terminal(trd: Trd) -> None:
    with pausing() as tell:
        command = [sys.executable, "-m", "triton_distributed.cli.main", "watch", "--interval", "0.05", "demo"]
        terminal = Shell(command, {**os.environ, **QUIET, "PYTHONPATH": str(SRC)})
        terminal.line("present", "demo.p.one")
        tell("pause")
        assert terminal.line("paused", "demo.p.two").endswith(PAUSED)

        # No endpoint of the worker is listed any more, and the other commands still find it.
        listed = [json.loads(line) for line in trd.run("ls", "--json").lines]
        assert [(each["endpoint"], each["state"]) for each in listed] == [
            ("demo.p.one", "paused"),
            ("demo.p.two", "paused"),
        ]
        assert "paused" in trd.run("describe", "demo.p.one").lines[0]
        (picture,) = map(json.loads, trd.run("top", "--once", "--json", "--interval", "1").lines)
        states = {each["endpoint"]: each["state"] for each in picture["instances"]}
        assert states == {"demo.p.one": "paused", "demo.p.two": "paused"}

        tell("resume")
        terminal.line("serving", "demo.p.two")
    terminal.line("gone", "demo.p.two")

    worker = trd.serve("worker:one_then_wait", "demo.b.g", "--max-inflight", "1")
    assert worker.address in terminal.line("come", "demo.b.g", str(worker.id))
    caller = trd.start("call", "demo.b.g", "1")
    assert "at capacity, 1 running of 1" in terminal.line("full", "demo.b.g")
    caller.kill()
    terminal.line("serving", "demo.b.g")
    worker.kill()
    terminal.line("gone", "demo.b.g", str(worker.id))
    terminal.type("\x03")  # Ctrl-C
    status, rest = terminal.end()
    assert (status, "Traceback" in rest) == (130, False)


def test_as_json_until_its_reader_leaves(trd: Trd) -> None:
    watching = trd.start("ls", "--watch", "--json", "--timeout", "0.2")
    assert watching.err is not None
    assert watching.err.readline().startswith("no endpoint is served (file://")
    worker = trd.serve("worker:echo", "demo.b.g")
    found = json.loads(watching.line())
    assert found.pop("time").endswith("+00:00")
    assert found == {
        "event": "come",
        "endpoint": "demo.b.g",
        "instance": str(worker.id),
        "reason": "",
        "addresses": [worker.address],
        "metadata": {},
    }
    worker.signal(signal.SIGSTOP)
    try:
        found = json.loads(watching.line())
    finally:
        worker.signal(signal.SIGCONT)
    assert (found["event"], bool(found["reason"])) == ("unreachable", True)
    assert json.loads(watching.line())["event"] == "serving"
    assert watching.out is not None
    watching.out.close()
    assert watching.process.wait(PATIENCE_S) == 0  # although nothing more happens
