"""A worker process: `python -m benchmarks.worker PEER DIRECTORY SERVICE [NEXT]`, started by benchmarks.client.

With the service `work` it serves every handler. With another name it is one hop of a chain: it passes requests on to
the service NEXT, or is the last hop.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.handlers import WORK, cancelling_relay, innermost, passing_relay, relay, tokens
from benchmarks.peers.foreign import EVERY
from harness.processes import answer_questions
from harness.vitals import open_descriptors, resident_bytes


class Turns:
    """Keeps the loop turning, and notes the longest time from one turn to the next."""

    def __init__(self) -> None:
        self._at = self._others = self._longest_s = self._computed_s = 0.0
        self._running = False

    def begin(self) -> None:
        """Turn from now on."""
        self._at, self._others, self._running = time.perf_counter(), _cpu_of_others(), True
        self._longest_s = self._computed_s = 0.0
        asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        now, others = time.perf_counter(), _cpu_of_others()
        self._longest_s = max(self._longest_s, now - self._at)
        self._computed_s = max(self._computed_s, others - self._others)
        self._at, self._others = now, others
        if self._running:
            asyncio.get_running_loop().call_soon(self._turn)

    def end(self) -> tuple[float, float]:
        """Stop. Return the longest time without a turn, and the longest that other threads computed meanwhile, s."""
        self._running = False
        return self._longest_s, self._computed_s


def _cpu_of_others() -> float:
    return time.process_time() - time.thread_time()


async def main(peer_name: str, directory: str, service: str, following: str = "") -> None:
    peer = EVERY[peer_name].make(Path(directory))
    ended: asyncio.Queue[float] = asyncio.Queue()
    turns = Turns()
    if service == "work":
        await peer.serve(service, WORK)
    elif following:
        kind = EVERY[peer_name]
        reading = relay if kind.leaves else cancelling_relay
        passing = passing_relay if kind.family in ("ours", "native") else reading
        hop, items = await peer.connect(following, "hop"), await peer.connect(following, "tokens")
        await peer.serve(service, {"hop": reading(hop), "tokens": passing(items)})
    else:
        await peer.serve(service, {"hop": innermost(ended), "tokens": tokens})

    async def answer(question: str) -> Any:
        if question == "held":
            gc.collect()
            return resident_bytes(), open_descriptors()
        if question == "ended":
            return await ended.get()
        if question == "status url":
            return peer.runtime.status_port.url  # type: ignore[attr-defined]  # Only ours is asked.
        if question == "turn":
            return turns.begin()
        if question == "longest turn":
            return turns.end()
        raise ValueError(f"unknown question {question!r}")

    await answer_questions(answer)
    # The measurement is over, and does not include a peer's shutdown.
    os._exit(0)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
