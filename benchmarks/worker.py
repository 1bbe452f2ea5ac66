"""A worker process: `python -m benchmarks.worker PEER DIRECTORY SERVICE [NEXT]`, started by benchmarks.client.

With the service `work` it serves every handler. With another name it is one hop of the cancellation chain: it passes
requests on to the service NEXT, or is the last hop.
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

from benchmarks.handlers import WORK, cancelling_relay, innermost, relay
from benchmarks.peers import PEERS
from harness.processes import answer_questions
from harness.vitals import resident_bytes


async def main(peer_name: str, directory: str, service: str, following: str = "") -> None:
    peer = PEERS[peer_name].make(Path(directory))
    ended: asyncio.Queue[float] = asyncio.Queue()
    if service == "work":
        await peer.serve(service, WORK)
    elif following:
        pass_on = cancelling_relay if PEERS[peer_name].family == "grpc.aio" else relay
        await peer.serve(service, {"hop": pass_on(await peer.connect(following, "hop"))})
    else:
        await peer.serve(service, {"hop": innermost(ended)})

    async def answer(question: str) -> Any:
        if question == "cpu":
            return time.process_time()
        if question == "memory":
            gc.collect()
            return resident_bytes()
        if question == "ended":
            return await ended.get()
        raise ValueError(f"unknown question {question!r}")

    await answer_questions(answer)
    # The measurement is over, and does not include a peer's shutdown.
    os._exit(0)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
