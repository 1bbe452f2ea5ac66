"""Embeds 64 texts with single calls at once.

python examples/batched_embedder/client.py
"""

import asyncio

from contracts import EMBED, EmbedRequest

import triton_distributed as trd


async def main() -> None:
    async with trd.connect() as here:
        calls = [here.call(EMBED, EmbedRequest(f"text {n}"), timeout=10) for n in range(64)]
        answers = await asyncio.gather(*calls)
        print(f"{len(answers)} vectors, batches of up to {max(each.batch_size for each in answers)}")


asyncio.run(main())
