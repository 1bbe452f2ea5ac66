"""A process for the tests of file discovery: `python worker.py COMMAND DIRECTORY …`. Says what it did, a line each.

It reads commands no more than a byte at a time and ends when its standard input does, so none outlives its test.
"""

from __future__ import annotations

import asyncio
import os
import sys

from triton_distributed.discovery.file import FileDiscovery
from triton_distributed.names import EndpointName, Instance
from triton_distributed.testing import ChangeLog

NAME = EndpointName("ns", "comp", "generate")
HOUR_S = 3600.0


def say(*words: object) -> None:
    os.write(1, f"{' '.join(map(str, words))}\n".encode())  # at once: parent and child share the pipe


def wait_for_a_byte() -> bool:
    return bool(os.read(0, 1))


def make(directory: str) -> FileDiscovery:
    return FileDiscovery(directory, poll_s=HOUR_S, check_s=HOUR_S)


async def register(directory: str, *ids: str) -> None:
    """Register, and stand still."""
    discovery = make(directory)
    for id in ids:
        await discovery.register(Instance(NAME, int(id), ("tcp://127.0.0.1:1",)))
    say("ready")
    wait_for_a_byte()
    await discovery.close()


async def fork(directory: str, *ids: str) -> None:
    """Register, fork a child that outlives us, and stand still."""
    discovery = make(directory)
    for id in ids:
        await discovery.register(Instance(NAME, int(id), ("tcp://127.0.0.1:1",)))
    child = os.fork()
    if child == 0:
        say("child")
        while wait_for_a_byte():
            say("child lives")
        os._exit(0)
    say("ready")
    while True:
        await asyncio.sleep(HOUR_S)


async def watch(directory: str) -> None:
    """Wait for a byte, watch, say what is there."""
    discovery = make(directory)
    say("ready")
    wait_for_a_byte()
    log = ChangeLog()
    await discovery.watch(NAME, log)
    say("ids", *log.ids)
    await discovery.close()


if __name__ == "__main__":
    asyncio.run({"register": register, "fork": fork, "watch": watch}[sys.argv[1]](*sys.argv[2:]))
