"""Sends a text through three processes and prints the answer, word by word.

    python examples/pipeline/client.py "greetings"

Start frontend.py, middle.py and backend.py in separate shells, in any order: each stage waits for the next one.
"""

import asyncio
import sys

from triton_distributed.runtime import DistributedRuntime, triton_worker


@triton_worker()
async def worker(runtime: DistributedRuntime, text: str):
    client = await runtime.namespace("examples/pipeline").component("frontend").endpoint("generate").client()
    await client.wait_for_instances()
    async for line in client.generate(text, annotated=False):
        print(line)


if __name__ == "__main__":
    asyncio.run(worker(" ".join(sys.argv[1:]) or "greetings"))
