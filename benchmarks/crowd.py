"""A crowd: `python -m benchmarks.crowd`. Ends with status 1 if a call fails or memory goes over its bound.

First, one process that is worker and client makes 20,000 concurrent calls to a handler that sleeps 0.1 s for each
character. Then 10,000 idle streams are opened over one connection between two processes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import uvloop

from harness.processes import Child
from harness.vitals import peak_resident_bytes, resident_bytes
from triton_distributed.runtime import Client, DistributedRuntime, triton_worker

MIB = 1 << 20
TEXT = "hello world"
SLEEP_S = 0.1
# Both ends of a call, the tasks of caller and handler, the request and up to 11 items: about 16 KiB for each call.
MAX_BYTES_PER_CALL = 16 << 10
MAX_BYTES_PER_IDLE_STREAM = 3 << 10  # On each side.
# A call takes 1.1 s by itself. The rest is the time of one core for 20,000 calls, with room for a slow core.
TIMEOUT_S = 120.0


async def spell(request: str) -> AsyncIterator[str]:
    for character in request:
        await asyncio.sleep(SLEEP_S)
        yield character


async def one_call(client: Client, outcomes: Counter[str]) -> None:
    try:
        stream = await client.generate(TEXT)
        text = "".join([item.data() async for item in stream])
        outcomes["whole" if text == TEXT else "incomplete"] += 1
    except Exception as error:
        outcomes[f"{type(error).__name__}: {error}"] += 1


@triton_worker()
async def many_calls(runtime: DistributedRuntime, number: int) -> bool:
    """Make `number` calls at once in this process; return whether all went well within the memory bound."""
    endpoint = runtime.namespace("crowd").component("backend").endpoint("generate")
    serving = asyncio.ensure_future(endpoint.serve_endpoint(spell))
    client = await endpoint.client()
    await client.wait_for_instances()
    outcomes: Counter[str] = Counter()
    await one_call(client, outcomes)
    before, started = resident_bytes(), time.perf_counter()
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.gather(*(one_call(client, outcomes) for _ in range(number)))
    passed = time.perf_counter() - started
    peak = peak_resident_bytes()
    each = (peak - before) / number
    runtime.shutdown()
    await serving
    good = outcomes == {"whole": number + 1} and each <= MAX_BYTES_PER_CALL
    print(
        f"{number:,} concurrent calls in {passed:.1f} s, {outcomes['whole'] - 1:,} whole; resident memory "
        f"{before / MIB:.0f} MiB before, {peak / MIB:.0f} MiB at its peak: {each:,.0f} bytes a call, both ends "
        f"(bound {MAX_BYTES_PER_CALL:,}): {'passed' if good else 'FAILED'}",
        flush=True,
    )
    for outcome, times in outcomes.most_common():
        if outcome != "whole":
            print(f"  {times:,} × {outcome}")
    return good


async def idle_streams(number: int, directory: Path) -> bool:
    """Open `number` idle streams between two processes; return whether one connection and the bound were enough."""
    client = await Child.start("benchmarks.client", "ours", str(directory), environ={"TRD_DIR": str(directory)})
    try:
        figures = await client.ask("idle", number=number)
    finally:
        await client.stop()
    worst = max(figures["client_bytes"], figures["worker_bytes"])
    good: bool = figures["descriptors"] == 0 and worst <= MAX_BYTES_PER_IDLE_STREAM
    print(
        f"{number:,} idle streams: {figures['worker_bytes']:,.0f} bytes each in the worker, "
        f"{figures['client_bytes']:,.0f} in the client (bound {MAX_BYTES_PER_IDLE_STREAM:,}), "
        f"{figures['descriptors']} more descriptors: {'passed' if good else 'FAILED'}",
        flush=True,
    )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crowd", description="Many calls and streams at once")
    parser.add_argument("--calls", type=int, default=20_000, help="concurrent calls in one process (20000)")
    parser.add_argument("--streams", type=int, default=10_000, help="idle streams over one connection (10000)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trc", dir="/tmp" if os.path.isdir("/tmp") else None) as directory:
        os.environ["TRD_DIR"] = directory
        good = uvloop.run(many_calls(arguments.calls))
        good = asyncio.run(idle_streams(arguments.streams, Path(directory))) and good
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
