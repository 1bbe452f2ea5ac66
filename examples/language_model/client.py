"""Asks the language model and prints its answer as it is written.

    python examples/language_model/client.py "Describe the sea in one sentence."
    python examples/language_model/client.py --enough 10 "Write a long story about a lighthouse."

With --enough it leaves after this many tokens, and the model stops generating.
"""

import argparse
import asyncio
import time

from triton_distributed.runtime import DistributedRuntime, triton_worker


@triton_worker()
async def worker(runtime: DistributedRuntime, prompt: str, enough: int | None):
    client = await runtime.endpoint("examples.smollm2.generate").client()
    await client.wait_for_instances()

    start, first, tokens = time.perf_counter(), 0.0, 0
    async for piece in client.generate({"prompt": prompt}, annotated=False):
        first = first or time.perf_counter() - start
        tokens += 1
        print(piece, end="", flush=True)
        if tokens == enough:
            break
    seconds = time.perf_counter() - start
    print(f"\n\n{tokens} tokens; the first after {first:.2f} s, all after {seconds:.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("prompt", nargs="?", default="Describe the sea in one sentence.")
    parser.add_argument("--enough", type=int, help="leave after this many tokens")
    arguments = parser.parse_args()
    asyncio.run(worker(arguments.prompt, arguments.enough))
