"""A process that was told to end ends, whatever its handlers do; it says which of them did not."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from tests.runtime.cluster import until
from tests.runtime.programs import program
from triton_distributed.system.signals import ECHO_S

WORKER = """
import asyncio, sys, threading, time
from triton_distributed.runtime import triton_worker
from triton_distributed.serving import endpoint
from triton_distributed.system import signals

signals.GRACE_S, endpoint.CUT_S = 0.6, 0.2  # as after a drain, but sooner

async def swallows(request):
    print("began", flush=True)
    while True:
        try:
            await asyncio.sleep(0.01)
        except BaseException:
            pass

async def swallows_in_its_cleanup(request):
    try:
        print("began", flush=True)
        await asyncio.sleep(3600)
    finally:
        await swallows(request)

async def blocks_the_loop(request):
    print("began", flush=True)
    time.sleep(3600)

async def computes_for_ever(request):
    print("began", flush=True)
    while True:
        pass

def sleeps_in_a_thread(request):
    print("began", flush=True)
    time.sleep(3600)

async def ends(request):
    print("began", flush=True)
    await asyncio.sleep(3600)

@triton_worker()
async def worker(runtime):
    handler = globals()[sys.argv[1]]
    serving = runtime.endpoint("t.c.e").serve_endpoint(handler)
    client = await runtime.endpoint("t.c.e").client()
    await client.wait_for_instances()
    stream = client.generate(1)
    await serving
    print("over", flush=True)

if sys.argv[2] == "uvloop":
    import uvloop
    uvloop.install()
asyncio.run(worker())
"""

STUCK = {
    "swallows": "handler swallows stands at",
    "swallows_in_its_cleanup": "handler swallows_in_its_cleanup stands at",
    "blocks_the_loop": "in blocks_the_loop",
    "computes_for_ever": "in computes_for_ever",
}
QUICK = {"TRD_DRAIN_TIMEOUT_S": "0.2", "TRD_WATCHDOG_S": "0"}


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("kind", STUCK)
@pytest.mark.leaves("socket files", reason="a handler that never ends keeps its worker from cleaning up")
async def test_a_drain_ends_and_says_what_did_not(
    kind: str, number: signal.Signals, loop: str, trd_dir: Path, tmp_path: Path
) -> None:
    async with program(tmp_path, WORKER, kind, loop, environment=QUICK) as worker:
        assert await worker.line() == "began"
        worker.signal(number)
        _, words = await worker.output()
        assert await worker.ended() == 128 + number
    assert f"{number.name} 0.8 s ago: ending now, although not everything has ended" in words
    assert STUCK[kind] in words


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("kind", STUCK)
@pytest.mark.leaves("socket files", reason="the second signal ends it at once")
async def test_a_second_signal_ends_it_at_once_even_where_the_loop_is_stuck(
    kind: str, loop: str, trd_dir: Path, tmp_path: Path
) -> None:
    slow = {**QUICK, "TRD_DRAIN_TIMEOUT_S": "3600"}
    async with program(tmp_path, WORKER, kind, loop, environment=slow) as worker:
        assert await worker.line() == "began"
        before = _threads(worker.pid)
        worker.signal(signal.SIGTERM)
        await until(lambda: _threads(worker.pid) > before)  # it was handled: a thread waits for the end of the drain
        heard = asyncio.get_running_loop().time()
        await until(lambda: asyncio.get_running_loop().time() - heard > 2 * ECHO_S)
        worker.signal(signal.SIGTERM)
        _, words = await worker.output()
        assert await worker.ended() == 128 + signal.SIGTERM
    assert "SIGTERM again: ending now, 1 request(s) cut" in words


def _threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_a_handler_that_ends_when_it_is_cancelled_is_a_clean_end(
    loop: str, trd_dir: Path, tmp_path: Path
) -> None:
    async with program(tmp_path, WORKER, "ends", loop, environment=QUICK) as worker:
        assert await worker.line() == "began"
        worker.signal(signal.SIGTERM)
        assert await worker.line() == "over"
        assert await worker.ended() == 0


async def test_a_plain_handler_that_cannot_be_interrupted_is_named_and_left_behind(
    trd_dir: Path, tmp_path: Path
) -> None:
    async with program(tmp_path, WORKER, "sleeps_in_a_thread", "asyncio", environment=QUICK) as worker:
        assert await worker.line() == "began"
        worker.signal(signal.SIGTERM)
        _, words = await worker.output()
        assert await worker.ended() in (0, 128 + signal.SIGTERM)
    assert "handler sleeps_in_a_thread stands at" in words
