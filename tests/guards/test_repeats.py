"""A test that is marked as noisy is repeated once, and the output says so."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.guards.tree import ROOT


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_noisy_is_repeated_once_and_counted(workers: int) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", str(workers), "tests/guards/noisy.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "2 failed, 2 passed, 1 error" in done.stdout, done.stdout + done.stderr
    assert "test_without_a_reason: noisy(…) takes a reason=" in done.stdout
    said = done.stdout.partition("repeated, as they are known to be noisy: 2")[2].splitlines()
    assert said[1] == "tests/guards/noisy.py::test_once: the machine was busy"
    assert said[2].startswith("  call: ")
    assert said[3] == "tests/guards/noisy.py::test_always: the machine was busy"
    assert "LookupError" in said[4]
    assert "LookupError: time 2" in done.stdout
