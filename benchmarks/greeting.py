"""Hello world with any peer: `python -m benchmarks.greeting server|client MODULE DIRECTORY`. Run by benchmarks.startup.

The server's process also starts the servers that the peer needs. The client waits until the server's process says
that it can be called, and then does as in hello.py.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
import time
from pathlib import Path

import uvloop

from benchmarks.handlers import tokens
from benchmarks.peers import Peer
from benchmarks.peers.foreign import Hosting, servers

READY = "ready"
LOOK_S = 0.002


def make(module: str, directory: Path) -> Peer:
    peer: Peer = importlib.import_module(f"benchmarks.peers.{module}").make(directory, False)
    return peer


async def server(module: str, directory: Path) -> None:
    async with servers(module, directory):
        here = make(module, directory)
        if isinstance(here, Hosting):
            await here.host("")
        else:
            await here.serve("work", {"tokens": tokens})
        (directory / READY).touch()
        await asyncio.Event().wait()


async def client(module: str, directory: Path) -> None:
    here = make(module, directory)
    while not (directory / READY).exists():
        await asyncio.sleep(LOOK_S)
    call = await here.connect("work", "tokens")
    async for _ in call({"n": 1}):
        print(time.perf_counter(), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    uvloop.run({"server": server, "client": client}[sys.argv[1]](sys.argv[2], Path(sys.argv[3])))
