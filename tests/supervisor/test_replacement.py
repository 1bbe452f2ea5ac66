"""How replicas that run are replaced: without a gap, with what each one is given, and after enough requests."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from pathlib import Path

import pytest

import triton_distributed as trd
from tests.supervisor.supervised import WORKER, supervised, written
from tests.supervisor.test_replicas import Load, ask, found
from tests.timing import PATIENCE_S
from triton_distributed.supervisor import pinning

pytestmark = pytest.mark.usefixtures("trd_dir")

OPTIONS = WORKER.replace("int(sys.argv[1])", "trd.Replicas(1, **eval(sys.argv[1]))")


async def called(here: trd.Connection) -> int:
    """The process that answers."""
    return (await found(here, 1))["0"]


async def test_one_replica_is_replaced_without_a_gap_also_if_it_ends_meanwhile(tmp_path: Path) -> None:
    fifo = tmp_path / "gate"
    os.mkfifo(fifo)
    code = WORKER.replace(
        "if __name__",
        """
if "TRD_REPLICA" in os.environ and os.path.exists("slow"):
    import time
    print("loading", flush=True)
    while os.path.exists("slow"):
        time.sleep(0.01)
if __name__""",
    )
    with supervised(tmp_path, written(tmp_path, code), "1") as running:
        await asyncio.to_thread(running.ready, 1)
        async with trd.connect() as here:
            old = await called(here)
            load = Load(here)
            call = asyncio.ensure_future(here.call("a.b.gated", str(fifo)))
            await asyncio.to_thread(running.line, r"\[0\] begun")
            running.signal(signal.SIGHUP)
            await load.until(1, {old})
            assert len(running.replicas()) == 2  # The old process still has a request.
            fifo.write_text("")
            await asyncio.to_thread(running.line, r"restarted: 1 replica\(s\)")
            assert await call == "done"
            await load.stop()
            assert load.errors == []
            old = await called(here)
            assert running.replicas() == [old]

            (tmp_path / "slow").touch()
            running.signal(signal.SIGHUP)
            await asyncio.to_thread(running.line, r"\[0\] loading")
            [successor] = set(running.replicas()) - {old}
            os.kill(old, signal.SIGTERM)
            text = rf"replica 0: process {old} ended with status 0 while its successor starts"
            await asyncio.to_thread(running.line, text)
            (tmp_path / "slow").unlink()
            await asyncio.to_thread(running.line, r"restarted: 1 replica\(s\)")
            assert await asyncio.wait_for(called(here), PATIENCE_S) == successor
        await asyncio.to_thread(running.stop)


async def test_with_drain_first_the_old_process_ends_before_its_successor_starts(tmp_path: Path) -> None:
    code = OPTIONS.replace("if __name__", "print('starts', flush=True)\nif __name__")
    with supervised(tmp_path, written(tmp_path, code), "{'drain_first': True}") as running:
        await asyncio.to_thread(running.ready, 1)
        old = (await ask(1))["0"]
        running.signal(signal.SIGHUP)
        await asyncio.to_thread(running.line, r"\[0\] ran")
        await asyncio.to_thread(running.line, r"\[0\] starts")
        await asyncio.to_thread(running.line, r"restarted: 1 replica\(s\)")
        assert (await ask(1))["0"] != old
        await asyncio.to_thread(running.stop)


async def test_what_each_replica_is_given_and_that_it_is_replaced_after_its_requests(tmp_path: Path) -> None:
    code = """
import os, sys
import triton_distributed as trd

@trd.serve("a.b.who")
async def who(request: object) -> tuple[str, int]:
    return os.environ["TRD_REPLICA"], os.getpid()

@trd.serve("a.b.has")
async def has(request: object) -> list[object]:
    cores = os.sched_getaffinity(0) if sys.platform == "linux" else ()
    return [os.environ["GPU"], os.environ["JSON"], sorted(cores)]
"""
    options = ["--replicas", "2", "--max-requests", "40", "--env", "GPU=gpu{replica}", "--env", 'JSON={"a": 1}']
    cores: list[pinning.Cores] = [(), ()]
    if sys.platform == "linux":
        options.append("--pin")
        cores = pinning.shares(2, pinning.allowed_cores())
    written(tmp_path, code)
    with supervised(tmp_path, "-m", "triton_distributed.cli.main", "serve", "worker", *options) as running:
        where = " on cores " + " | ".join(map(pinning.described, cores)) if cores[0] else ""
        await asyncio.to_thread(running.line, rf"ready: 2 replica\(s\){re.escape(where)}")
        async with trd.connect() as here:
            given: list[object] = []
            async with asyncio.timeout(PATIENCE_S):
                while len(given) < 2:
                    one = await here.call("a.b.has", None)
                    if one not in given:
                        given.append(one)
            expected = [[f"gpu{number}", '{"a": 1}', list(cores[number])] for number in range(2)]
            assert sorted(given, key=str) == expected
            pids = set((await found(here, 2)).values())
            load = Load(here)
            await load.until(4, pids)
            await load.stop()
            assert load.errors == []
        await asyncio.to_thread(running.stop)
