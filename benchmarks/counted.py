"""Both ends of a peer on one loop: `python -m benchmarks.counted PEER WORK DIRECTORY`, run by benchmarks.callgrind.

After a warm-up it makes a fixed number of calls, which alone are counted. One process on one loop takes the same steps
in each run, so the counts of two runs on an idle machine differ by less than 1 %.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from pathlib import Path

import uvloop

from benchmarks.counted_import import count
from benchmarks.handlers import WORK
from benchmarks.peers import PEERS
from triton_distributed.calling import call
from triton_distributed.serving import request
from triton_distributed.transport import inbound

# Work: callers at the same time, items a call, calls of each caller that are not counted, calls that are counted.
WORKS = {"alone": (1, 1, 200, 600), "concurrent": (64, 1, 20, 30), "streams": (16, 500, 2, 3)}

# Valgrind makes a call take fifty times as long, and what is done about a call's times depends on how long it takes. So
# the clock of the runtime goes on by 5 µs at each reading, which makes calls about as long as without valgrind.
CLOCK = itertools.count(1.0, 5e-6).__next__
TIMED = (call, request, inbound)


def counted(work: str) -> int:
    """Return how many calls (`alone`, `concurrent`) or items (`streams`) are counted."""
    callers, items, _, calls = WORKS[work]
    return callers * items * calls


async def main(peer_name: str, work: str, directory: str) -> None:
    for each in TIMED:
        each.monotonic = CLOCK  # type: ignore[attr-defined]
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
