"""A worker behind the gateway. It counts words, and streams tokens.

    python examples/gateway/worker.py

Start it in one shell or in several. Each takes at most 32 streams at a time.
"""

import asyncio
from collections.abc import AsyncIterator

from contracts import COUNT, GENERATE, Count, Prompt, Token

import triton_distributed as trd


@trd.serve(COUNT)
def count(prompt: Prompt) -> Count:
    return Count(len(prompt.text.split()))


@trd.serve(GENERATE, max_inflight=32)
async def generate(prompt: Prompt) -> AsyncIterator[Token]:
    for number in range(prompt.words):
        await asyncio.sleep(0.02)  # A model would compute here.
        yield Token(f"{prompt.text}-{number}")


if __name__ == "__main__":
    trd.run()
