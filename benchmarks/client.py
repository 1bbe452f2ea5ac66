"""A client process: `python -m benchmarks.client PEER DIRECTORY [chain]`. It starts its worker or chain of workers."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.peers import PEERS
from benchmarks.workloads import WORKLOADS, Pair
from harness.processes import Child, answer_questions

WORKER = "benchmarks.worker"


async def main(peer_name: str, directory: str, shape: str = "") -> None:
    if shape == "chain":
        workers = [await Child.start(WORKER, peer_name, directory, "third")]
        workers.append(await Child.start(WORKER, peer_name, directory, "second", "third"))
        workers.append(await Child.start(WORKER, peer_name, directory, "first", "second"))
    else:
        workers = [await Child.start(WORKER, peer_name, directory, "work")]
    pair = Pair(PEERS[peer_name].make(Path(directory)), workers)

    async def answer(question: str, **arguments: Any) -> Any:
        return await WORKLOADS[question](pair, **arguments)

    try:
        await answer_questions(answer)
    finally:
        for worker in workers:
            await worker.stop()
    os._exit(0)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
