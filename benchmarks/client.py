"""A client process: `python -m benchmarks.client PEER DIRECTORY [chain]`. It starts its worker or chain of workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.peers.foreign import EVERY, Closing, Hosting, servers
from benchmarks.workloads import WORKLOADS, Pair, Worker
from harness.processes import Child, answer_questions

WORKER = "benchmarks.worker"


async def main(peer_name: str, directory: str, shape: str = "") -> None:
    async with servers(EVERY[peer_name].module, Path(directory)):
        peer = EVERY[peer_name].make(Path(directory))
        children: list[Child] = []
        workers: Sequence[Worker] = children
        if isinstance(peer, Hosting):
            workers = await peer.host(shape)
        elif shape == "chain":
            children.append(await Child.start(WORKER, peer_name, directory, "third"))
            children.append(await Child.start(WORKER, peer_name, directory, "second", "third"))
            children.append(await Child.start(WORKER, peer_name, directory, "first", "second"))
        else:
            children.append(await Child.start(WORKER, peer_name, directory, "work"))
        pair = Pair(peer, workers)

        async def answer(question: str, **arguments: Any) -> Any:
            return await WORKLOADS[question](pair, **arguments)

        try:
            await answer_questions(answer)
        finally:
            for child in children:
                await child.stop()
            if isinstance(peer, Closing):
                await peer.close()
    os._exit(0)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
