"""`python -m benchmarks.shared`: arrays between processes of one host, through shared memory and through sockets.

In each round every measurement runs once for each way, so noise hits them alike; the table has medians. `echo` sends an
array to a worker and back, and counts its bytes once. `one by one` and `at once` send 200 MB to four workers.
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
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

import triton_distributed as trd
from triton_distributed.config import Config
from triton_distributed.runtime import Client, DistributedRuntime

MIB = 1024 * 1024
WORKERS = 4
WAYS = ("shared memory", "socket", "trd.share")
Taken = dict[str, dict[str, list[float]]]


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


async def measure(rounds: int, megabytes: int) -> Taken:
    """Return all figures of all rounds, by measurement and way."""
    taken: Taken = {}
    arrays = {f"echo of {size} MiB, GB/s": np.arange(size * MIB // 4, dtype=np.float32) for size in (1, 16)}
    large = np.arange(megabytes * 250_000, dtype=np.float32)
    async with AsyncExitStack() as stack:
        clients = {}
        for way in WAYS[:2]:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trd-")))
            environ = {} if way == "shared memory" else {"TRD_SHARED_MEMORY_BYTES": "0"}
            await stack.enter_async_context(_workers(place, environ))
            config = Config.from_env({"TRD_DIR": str(place), **environ}, handle_signals=False)
            runtime = await stack.enter_async_context(DistributedRuntime(config=config))
            clients[way] = [await runtime.endpoint(f"bench.shared.{name}").client() for name in ("echo", "count")]
            for client in clients[way]:
                await client.wait_for_instances(WORKERS)
        for number in range(rounds + 1):
            for way, (echo, count) in clients.items():
                found = {name: await _round_trips(echo, array, 10) for name, array in arrays.items()}
                for at_once in (False, True):
                    found[_name(megabytes, at_once)] = await _spread(count, large, at_once)
                _note(taken if number else {}, way, found)  # The first round warms up.
            started = time.perf_counter()
            shared = trd.share(large)
            placed = time.perf_counter() - started
            count = clients["shared memory"][1]
            found = {
                _name(megabytes, at_once): placed + await _spread(count, shared, at_once) for at_once in (False, True)
            }
            _note(taken if number else {}, "trd.share", found)
            del shared
    return taken


def _name(megabytes: int, at_once: bool) -> str:
    return f"{megabytes} MB to {WORKERS} workers {'at once' if at_once else 'one by one'}, s"


def _note(taken: Taken, way: str, found: dict[str, float]) -> None:
    for name, value in found.items():
        taken.setdefault(name, {}).setdefault(way, []).append(value)


def table(taken: Taken) -> str:
    """Return the medians, with the least and the greatest figure."""
    lines = [f"{'':36}" + "".join(f"{way:>26}" for way in WAYS)]
    for name, ways in taken.items():
        cells = [
            f"{statistics.median(each):.3g} ({min(each):.3g}–{max(each):.3g})" if (each := ways.get(way)) else "–"
            for way in WAYS
        ]
        lines.append(f"{name:36}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shared", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=200, help="size of the array for four workers")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        uvloop.run(_serve())
    else:
        print(table(uvloop.run(measure(options.rounds, options.megabytes))))


if __name__ == "__main__":
    main()
