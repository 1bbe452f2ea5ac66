"""Hello world as a user writes it: `python -m benchmarks.hello server|client`. Run by benchmarks.startup.

The client prints the time of its first item, and then waits for the end of stdin, so that it can be measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator

import uvloop

from triton_distributed.runtime import DistributedRuntime, triton_worker

ENDPOINT = "hello.backend.generate"


async def generate(request: str) -> AsyncIterator[str]:
    for character in request:
        yield character


@triton_worker()
async def server(runtime: DistributedRuntime) -> None:
    await runtime.endpoint(ENDPOINT).serve_endpoint(generate)


@triton_worker()
async def client(runtime: DistributedRuntime) -> None:
    client = await runtime.endpoint(ENDPOINT).client()
    await client.wait_for_instances()
    async for _ in client.generate("hello world"):
        print(time.perf_counter(), flush=True)
        break
    sys.stdin.read()


if __name__ == "__main__":
    uvloop.run({"server": server, "client": client}[sys.argv[1]]())
