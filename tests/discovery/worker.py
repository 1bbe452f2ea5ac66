"""A process for the tests of discovery: `python worker.py COMMAND PLACE …`. Says what it did, a line each.

It reads commands no more than a byte at a time and ends when its standard input does, so none outlives its test.
"""

from __future__ import annotations

import asyncio
import os
import sys

from triton_distributed.discovery.etcd.backend import EtcdDiscovery
from triton_distributed.discovery.file.backend import FileDiscovery
from triton_distributed.errors import DiscoveryError
from triton_distributed.external.etcd_endpoint import EtcdOptions
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


async def register_in_etcd(url: str, prefix: str, ttl_s: str, *ids: str) -> None:
    """Register, and say what goes wrong; a byte blocks the loop until the next one, a third ends it."""
    discovery = EtcdDiscovery(EtcdOptions(url), prefix=prefix, lease_ttl_s=int(ttl_s))
    for id in ids:
        await discovery.register(Instance(NAME, int(id), ("tcp://127.0.0.1:1",)))
    say("ready")
    await asyncio.get_running_loop().run_in_executor(None, wait_for_a_byte)
    say("blocked")
    wait_for_a_byte()
    say("free")
    await asyncio.get_running_loop().run_in_executor(None, wait_for_a_byte)
    await discovery.close()
    say("closed")


async def fork_with_etcd(url: str, prefix: str) -> None:
    """Register, and let a forked child try what it has inherited."""
    discovery = EtcdDiscovery(EtcdOptions(url), prefix=prefix)
    await discovery.register(Instance(NAME, 1, ("tcp://127.0.0.1:1",)))
    say("ready")
    child = os.fork()
    if child == 0:
        asyncio.events._set_running_loop(None)
        say(asyncio.run(try_inherited(discovery)))
        os._exit(0)
    os.waitpid(child, 0)
    await discovery.close()
    say("closed")


async def try_inherited(discovery: EtcdDiscovery) -> str:
    await discovery.withdraw(Instance(NAME, 1, ("tcp://127.0.0.1:1",)))
    try:
        await discovery.register(Instance(NAME, 2, ("tcp://127.0.0.1:1",)))
    except DiscoveryError as error:
        await discovery.close()
        return str(error)
    return "registered"


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
    commands = (register, register_in_etcd, fork, fork_with_etcd, watch)
    asyncio.run({each.__name__: each for each in commands}[sys.argv[1]](*sys.argv[2:]))
