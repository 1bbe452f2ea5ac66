"""Serves two endpoints, and pauses and resumes both as the lines of its input say."""

from __future__ import annotations

import asyncio
import sys

import triton_distributed as trd


async def main() -> None:
    async with trd.connect() as here:
        served = [await here.serve(f"demo.p.{name}", lambda request: request) for name in ("one", "two")]
        print("ready", served[0].instance.id, flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            for each in served:
                await (each.pause() if line == "pause\n" else each.resume())
            print("done", flush=True)


asyncio.run(main())
