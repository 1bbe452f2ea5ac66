"""Signals where a process has several runtimes, is a fork, or does not serve yet or any more."""

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

# A worker that stands still at one moment of its start; what it waits for never comes, unless it drains.
STARTS = """
import asyncio, os, signal, sys
from triton_distributed.discovery.file.backend import FileDiscovery
from triton_distributed.runtime import triton_worker
from triton_distributed.serving import addresses

async def echo(request):
    return request

going_on = asyncio.Event()

def stands_still(function, after):
    async def changed(*arguments):
        result = await function(*arguments) if after else None
        print("here", flush=True)
        await going_on.wait()
        return result if after else await function(*arguments)
    return changed

moment = sys.argv[1]
if moment == "listens":
    addresses.published = stands_still(addresses.published, False)
elif moment == "registers":
    FileDiscovery.register = stands_still(FileDiscovery.register, False)
elif moment == "has registered":
    FileDiscovery.register = stands_still(FileDiscovery.register, True)

@triton_worker()
async def main(runtime):
    drains = runtime.primary_token().cancelled()
    drains.add_done_callback(lambda _: going_on.set())
    serving = runtime.endpoint("t.c.e").serve_endpoint(echo)
    if moment == "has just begun":
        os.kill(os.getpid(), signal.SIGTERM)
        print("here", flush=True)
    print("served:", await serving, flush=True)

asyncio.run(main())
"""

IN_A_HANDLER = """
import asyncio, logging, os, signal, sys
from triton_distributed import log_requests
from triton_distributed.runtime import DistributedRuntime

logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(request_id)s %(message)s")
log_requests()

async def ends(request):
    os.kill(os.getpid(), signal.SIGTERM)
    return request

async def main():
    runtime = DistributedRuntime()
    served = runtime.endpoint("t.c.e").serve_endpoint(ends)
    client = await runtime.endpoint("t.c.e").client()
    await client.wait_for_instances()
    await client.call(1)
    await served
    await runtime.close()

asyncio.run(main())
"""

NO_MORE = """
import asyncio
from triton_distributed.runtime import triton_worker

async def echo(request):
    return request

@triton_worker()
async def main(runtime):
    endpoint = runtime.endpoint("t.c.e")
    client = await endpoint.client()
    for _ in range(2):
        serving = endpoint.serve_endpoint(echo)
        await client.wait_for_instances()
        serving.cancel()
        await asyncio.wait([serving])
    print("serves no more", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.mark.parametrize("moment", ["has just begun", "listens", "registers", "has registered"])
async def test_a_signal_while_a_worker_starts_leaves_nothing(trd_dir: Path, tmp_path: Path, moment: str) -> None:
    async with program(tmp_path, STARTS, moment) as worker:
        assert await worker.line() == "here"
        if moment != "has just begun":
            worker.signal(signal.SIGTERM)
        assert await worker.line() == "served: None"
        assert await worker.ended() == 0
    assert [each for each in trd_dir.rglob("*") if not each.is_dir()] == []


@pytest.mark.usefixtures("trd_dir")
async def test_the_log_of_a_drain_names_no_request_that_the_signal_has_interrupted(tmp_path: Path) -> None:
    async with program(tmp_path, IN_A_HANDLER) as worker:
        assert await worker.ended() == 0
        said = (await worker.output())[0]
    assert "\n- SIGTERM: draining, " in said


@pytest.mark.usefixtures("trd_dir")
@pytest.mark.leaves("socket files", reason="SIGTERM ends it without cleaning up, as it would any program")
async def test_a_worker_that_serves_no_more_ends_as_any_program_does(tmp_path: Path) -> None:
    async with program(tmp_path, NO_MORE) as worker:
        assert await worker.line() == "serves no more"
        worker.signal(signal.SIGTERM)
        assert await worker.ended() == -signal.SIGTERM


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
