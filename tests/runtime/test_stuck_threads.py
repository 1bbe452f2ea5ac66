"""A handler's thread that is stuck in C code cannot be stopped, and does not keep its process."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from tests.runtime.cluster import Cluster, patiently
from tests.runtime.programs import program
from triton_distributed.errors import TritonError

WORKER = """
import asyncio, sys, threading, time
from triton_distributed.runtime import DistributedRuntime, triton_worker
from triton_distributed.serving import endpoint

endpoint.CUT_S = 0.05

def stuck():
    print("stuck", flush=True)
    if "lock" in sys.argv:
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    else:
        time.sleep(3600)

def function(request):
    stuck()

def generator(request):
    yield 1
    stuck()

@triton_worker()
async def main(runtime):
    await runtime.endpoint("t.c.e").serve_endpoint(generator if "generator" in sys.argv else function)
    print("drained", flush=True)

if "uvloop" in sys.argv:
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("kind", ["function", "generator"])
@pytest.mark.parametrize("where", ["sleep", "lock"])
async def test_a_drained_worker_exits_though_a_handler_is_stuck(
    where: str, kind: str, loop: str, unix: Cluster, tmp_path: Path
) -> None:
    quickly = {"TRD_DRAIN_TIMEOUT_S": "0.05"}
    async with program(tmp_path, WORKER, where, kind, loop, environment=quickly) as worker:
        client = await unix.client()
        call = asyncio.create_task(client.call(1))
        assert await worker.line() == "stuck"
        worker.signal(signal.SIGTERM)
        assert await worker.line() == "drained"
        assert await worker.ended() == 0
        with pytest.raises(TritonError):
            await patiently(call)


async def test_a_caller_that_gave_up_does_not_leave_a_worker_that_cannot_end(unix: Cluster, tmp_path: Path) -> None:
    quickly = {"TRD_DRAIN_TIMEOUT_S": "0.05"}
    async with program(tmp_path, WORKER, "sleep", "function", "asyncio", environment=quickly) as worker:
        client = await unix.client()
        call = asyncio.create_task(client.call(1))
        assert await worker.line() == "stuck"
        call.cancel()
        await asyncio.wait([call])
        worker.signal(signal.SIGTERM)
        assert await worker.line() == "drained"
        assert await worker.ended() == 0
