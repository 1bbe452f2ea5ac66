"""`python -m benchmarks.shared`: arrays between processes of one host, through shared memory and through sockets.

It writes results/shared.json. In each round every measurement runs once for each way, so noise hits them alike. `echo`
sends an array to a worker and back, and counts its bytes once. `four workers` sends 200 MB to four workers, one after
another and at once; with `trd.share` the time includes placing the array.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

import triton_distributed as trd
from benchmarks.rounds import RESULTS, Figures, Measure, Run
from triton_distributed.config import Config
from triton_distributed.runtime import Client, DistributedRuntime

MIB = 1024 * 1024
WORKERS = 4
WAYS: dict[str, dict[str, str]] = {"shared memory": {}, "socket": {"TRD_SHARED_MEMORY_BYTES": "0"}}
"""The settings of each way; `trd.share` uses those of the first."""


async def _echo(request: Any) -> AsyncIterator[Any]:
    yield request


async def _count(request: Any) -> AsyncIterator[Any]:
    yield request.nbytes


async def _serve() -> None:
    """The program of a worker."""
    async with DistributedRuntime() as runtime:
        echo, count = (runtime.endpoint(f"bench.shared.{name}") for name in ("echo", "count"))
        await asyncio.gather(echo.serve_endpoint(_echo), count.serve_endpoint(_count))


@asynccontextmanager
async def _workers(place: Path, environ: dict[str, str]) -> AsyncIterator[None]:
    started = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.shared", "--worker", env={**os.environ, "TRD_DIR": str(place), **environ}
        )
        for _ in range(WORKERS)
    ]
    try:
        yield
    finally:
        for each in started:
            each.terminate()
        await asyncio.gather(*(each.wait() for each in started))


async def _one(client: Client, request: Any, instance: int) -> Any:
    # `generate` and `direct` would copy the request first.
    return await client.call(
        request, policy=lambda request, instances, load: next(each for each in instances if each.id == instance)
    )


async def _round_trips(client: Client, array: Any, count: int) -> float:
    """Return the rate in GB/s."""
    instance = client.instance_ids()[0]
    taken = []
    for _ in range(count):
        started = time.perf_counter()
        got = await _one(client, array, instance)
        taken.append(time.perf_counter() - started)
        if got.shape != array.shape or got[-1] != array[-1]:
            raise RuntimeError("another array came back")
        del got
    return float(array.nbytes / statistics.median(taken) / 1e9)


async def _spread(client: Client, array: Any, at_once: bool) -> float:
    """Return the seconds until all workers have the array."""
    started = time.perf_counter()
    calls = [_one(client, array, each) for each in client.instance_ids()]
    sizes = await asyncio.gather(*calls) if at_once else [await each for each in calls]
    if sizes != [array.nbytes] * WORKERS:
        raise RuntimeError("another array came")
    return time.perf_counter() - started


async def measure(rounds: int, megabytes: int) -> Run:
    """Measure in rounds; the first one warms up and is not counted."""
    arrays = {size: np.arange(size * MIB // 4, dtype=np.float32) for size in (1, 16)}
    large = np.arange(megabytes * 250_000, dtype=np.float32)
    measures: dict[tuple[str, str], Measure] = {}

    async def echo_of(client: Client, array: Any) -> Figures:
        return {"gb_per_s": await _round_trips(client, array, 10)}

    async def to_workers(client: Client) -> Figures:
        return _compared(await _spread(client, large, False), await _spread(client, large, True))

    async def share_with_workers(client: Client) -> Figures:
        started = time.perf_counter()
        shared = trd.share(large)
        placed = time.perf_counter() - started
        return _compared(*[placed + await _spread(client, shared, at_once) for at_once in (False, True)])

    async with AsyncExitStack() as stack:
        for way, environ in WAYS.items():
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trd-")))
            await stack.enter_async_context(_workers(place, environ))
            config = Config.from_env({"TRD_DIR": str(place), **environ}, handle_signals=False)
            runtime = await stack.enter_async_context(DistributedRuntime(config=config))
            echo, count = [await runtime.endpoint(f"bench.shared.{name}").client() for name in ("echo", "count")]
            for client in (echo, count):
                await client.wait_for_instances(WORKERS)
            for size, array in arrays.items():
                measures[f"echo {size} MiB", way] = partial(echo_of, echo, array)
            measures["four workers", way] = partial(to_workers, count)
            if not environ:
                measures["four workers", "trd.share"] = partial(share_with_workers, count)
        await Run().interleave(1, measures)
        run = Run()
        await run.interleave(rounds, measures)
    return run


def _compared(in_turn: float, at_once: float) -> Figures:
    return {"in_turn_s": in_turn, "at_once_s": at_once, "at_once_over_in_turn": at_once / in_turn}


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shared", description="Shared memory and sockets")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all of it (5)")
    parser.add_argument("--megabytes", type=int, default=200, help="size of the array for four workers (200)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        uvloop.run(_serve())
        return 0
    run = uvloop.run(measure(options.rounds, options.megabytes))
    whole = options.megabytes == 200
    path = RESULTS / ("shared.json" if whole else "partial-shared.json")
    result = run.write(path, rounds=options.rounds, quick=not whole, megabytes=options.megabytes)
    print("\n| work | way | figure | median | lowest | highest |\n| --- | --- | --- | --: | --: | --: |")
    for work, ways in result["figures"].items():
        for way, figures in ways.items():
            for figure, (median, lowest, highest) in figures.items():
                print(f"| {work} | {way} | {figure} | {median:.3g} | {lowest:.3g} | {highest:.3g} |")
    return 1 if run.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
