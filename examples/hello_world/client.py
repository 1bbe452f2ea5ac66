"""Calls hello world and prints each character as it arrives.

    python examples/hello_world/client.py            # one request
    python examples/hello_world/client.py 10         # ten requests, one after the other

Start a server in another shell, before or after this.
"""

import asyncio
import sys

from triton_distributed.runtime import DistributedRuntime, triton_worker


@triton_worker()
async def worker(runtime: DistributedRuntime, requests: int):
    endpoint = runtime.namespace("triton-init").component("backend").endpoint("generate")
    client = await endpoint.client()
    await client.wait_for_instances()

    for _ in range(requests):
        async for char in client.generate("hello world"):
            print(char.data())


if __name__ == "__main__":
    asyncio.run(worker(int(sys.argv[1]) if len(sys.argv) > 1 else 1))
