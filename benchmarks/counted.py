"""Both ends of a peer on one loop: `python -m benchmarks.counted PEER WORK DIRECTORY`, run by benchmarks.callgrind.

After a warm-up it makes a fixed number of calls, which alone are counted. One process on one loop takes the same steps
in each run, so the counts of two runs on an idle machine differ by less than 1 %.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
from pathlib import Path

import uvloop

from benchmarks.counted_import import count
from benchmarks.handlers import WORK
from benchmarks.peers import PEERS
from triton_distributed.serving import endpoint

# Work: callers at the same time, items a call, calls of each caller that are not counted, calls that are counted.
WORKS = {"alone": (1, 1, 200, 600), "concurrent": (64, 1, 20, 30), "streams": (16, 500, 2, 3)}


def counted(work: str) -> int:
    """Return how many calls (`alone`, `concurrent`) or items (`streams`) are counted."""
    callers, items, _, calls = WORKS[work]
    return callers * items * calls


async def main(peer_name: str, work: str, directory: str) -> None:
    endpoint.TIMES_FROM_S = math.inf  # Under valgrind each call would seem long enough for its times to be sent.
    peer = PEERS[peer_name].make(Path(directory))
    await peer.serve("work", WORK)
    call = await peer.connect("work", "tokens")
    callers, items, warm_up, calls = WORKS[work]

    async def caller(calls: int) -> None:
        for _ in range(calls):
            count = 0
            async for _ in call({"n": items}):
                count += 1
            if count != items:
                raise SystemExit(f"{count} items came, {items} were asked for")

    async def all_callers(calls: int) -> None:
        await asyncio.gather(*(caller(calls) for _ in range(callers)))

    await all_callers(warm_up)
    count("on")
    await all_callers(calls)
    count("off")
    os._exit(0)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
