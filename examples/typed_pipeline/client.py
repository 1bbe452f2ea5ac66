"""Asks a question and prints the answer as it arrives.

    python examples/typed_pipeline/client.py "HAL"

Start frontend.py, tokenizer.py and model.py in separate shells, in any order.
"""

import asyncio
import sys

from contracts import ASK, Question

import triton_distributed as trd


async def main(text: str) -> None:
    async with trd.connect() as here:
        async for piece in here.stream(ASK, Question(text), timeout=10, context=trd.Context(id="question-1")):
            print(piece.text, end="", flush=True)
        print()


asyncio.run(main(" ".join(sys.argv[1:]) or "HAL"))
