"""Calls the worker and prints each word as it arrives.

python examples/hello_native/client.py
"""

import asyncio

from worker import HELLO

import triton_distributed as trd


async def main() -> None:
    async with trd.connect() as here:
        async for word in here.stream(HELLO, "remote feels local"):
            print(word)


asyncio.run(main())
