"""`python -m triton_distributed.testing.chaos`: the status says what became of a run of the user's own worker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guards.tree import SRC
from tests.timing import PATIENCE_S

WORKER = """
import asyncio, os
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.testing.chaos import obey

async def handler(request):
    if request == "end":
        os._exit(7)
    return request

async def main():
    async with DistributedRuntime() as runtime:
        obey(runtime)
        await runtime.endpoint("t.c.e").serve_endpoint(handler)

asyncio.run(main())
"""

CALLS = """
from triton_distributed.errors import StreamIncomplete
from triton_distributed.runtime import DistributedRuntime

async def ends(cluster):
    async with DistributedRuntime(config=cluster.config) as runtime:
        client = await runtime.endpoint("t.c.e").client()
        await client.wait_for_instances()
        try:
            await client.call("end")
        except StreamIncomplete:
            pass
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SRC), *filter(None, sys.path)])}
    return subprocess.run(
        [sys.executable, "-m", "triton_distributed.testing.chaos", *arguments],
        capture_output=True, text=True, timeout=4 * PATIENCE_S, cwd=folder, env=environment,
    )  # fmt: skip


def test_a_worker_that_ends_by_itself_is_found_and_the_command_that_repeats_it_is_printed(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "calls.py").write_text(CALLS)
    options = ["--calls", "calls:ends", "--seconds", "0.1", "--workers", "2", "--kinds", "cut", "--seed", "3"]
    found = run(tmp_path, *options, "--", sys.executable, "worker.py")
    assert found.returncode == 1, found.stdout + found.stderr
    assert "ended by itself with 7" in found.stdout
    (again,) = [line for line in found.stdout.splitlines() if line.startswith("again:")]
    assert "--calls calls:ends --seed 3 --seconds 0.1 --workers 2 --kinds cut" in again
    assert again.endswith(f" -- {sys.executable} worker.py")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--calls", "no_such_module:calls"], "no_such_module"),
        (["--calls", "os:no_such_function"], "no_such_function"),
        (["--calls", "os:getpid", "--kinds", "earthquake"], "--kinds='earthquake'"),
    ],
)
def test_what_makes_no_sense_is_an_error(tmp_path: Path, options: list[str], words: str) -> None:
    found = run(tmp_path, *options, "worker")
    assert (found.returncode, found.stdout) == (2, "")
    assert words in found.stderr
