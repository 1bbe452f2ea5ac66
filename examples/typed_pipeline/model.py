"""Answers with a token for each token: the next letter.

trd serve model                                  (in this folder)
"""

import asyncio
from collections.abc import AsyncIterator

from contracts import GENERATE, Prompt, Token

import triton_distributed as trd


@trd.serve(GENERATE, max_inflight=64)
async def generate(prompt: Prompt, context: trd.Context) -> AsyncIterator[Token]:
    print(f"{context.id()} generate", flush=True)
    for token_id in prompt.token_ids:
        await asyncio.sleep(0.01)
        yield Token(token_id + 1)
