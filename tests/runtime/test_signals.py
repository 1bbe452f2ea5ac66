"""Signals where a process has several runtimes, or is a fork."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.runtime.programs import program

TWO = """
import asyncio
from triton_distributed.runtime import DistributedRuntime

async def echo(request):
    return request

async def main():
    one, other = DistributedRuntime(), DistributedRuntime()
    served = [each.endpoint("t.c.e").serve_endpoint(echo) for each in (one, other)]
    client = await one.endpoint("t.c.e").client()
    while len(client.instance_ids()) < 2:
        await asyncio.sleep(0.001)
    print("ready", flush=True)
    print(await asyncio.gather(*served), flush=True)
    await one.close()
    await other.close()

asyncio.run(main())
"""

FORK = """
import asyncio, os, signal, sys, time
from triton_distributed.runtime import DistributedRuntime

async def echo(request):
    return request

async def main():
    runtime = DistributedRuntime()
    served = runtime.endpoint("t.c.e").serve_endpoint(echo)
    client = await runtime.endpoint("t.c.e").client()
    await client.wait_for_instances()
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    os.kill(pid, signal.SIGTERM)
    _, status = await asyncio.to_thread(os.waitpid, pid, 0)
    print("child ended by", os.WTERMSIG(status) if os.WIFSIGNALED(status) else status, flush=True)
    print("parent answers", await client.call(1), "closing", runtime.closing, flush=True)
    await runtime.close()

asyncio.run(main())
"""


@pytest.mark.usefixtures("trd_dir")
async def test_a_signal_drains_every_runtime_of_the_process(tmp_path: Path) -> None:
    async with program(tmp_path, TWO) as two:
        assert await two.line() == "ready"
        two.signal(signal.SIGTERM)
        assert await two.line() == "[None, None]"
        assert await two.ended() == 0


@pytest.mark.usefixtures("trd_dir")
async def test_a_signal_to_a_forked_child_is_not_the_parents(tmp_path: Path) -> None:
    async with program(tmp_path, FORK) as parent:
        assert await parent.line() == f"child ended by {int(signal.SIGTERM)}"
        assert await parent.line() == "parent answers 1 closing False"
        assert await parent.ended() == 0
