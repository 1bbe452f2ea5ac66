"""Processes that publish or subscribe, each with a runtime of its own."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

from tests.runtime.programs import Program, program

# Says `ready`, then what it gets. After an event `end`: how many it got, how many were dropped, and it ends.
SUBSCRIBES = """
import asyncio, sys
from triton_distributed.config import Config
from triton_distributed.runtime import DistributedRuntime

async def main():
    async with DistributedRuntime(config=Config.from_env(handle_signals=False)) as runtime:
        subscription = await runtime.namespace("t").component("c").subscribe("e")
        print("ready", runtime.instance_id, flush=True)
        got = 0
        last = -1
        async for event in subscription:
            if event.data == "end":
                break
            got += 1
            number = event.data["number"] if isinstance(event.data, dict) else event.data
            if number <= last:
                print("after", last, "came", number, flush=True)
            last = number
            if got == 1:
                print("first", number, flush=True)
        print("got", got, "last", last, "dropped", subscription.dropped, flush=True)

asyncio.run(main())
"""

PUBLISHES = """
import asyncio, sys
from triton_distributed.config import Config
from triton_distributed.runtime import DistributedRuntime

async def main(count):
    async with DistributedRuntime(config=Config.from_env(handle_signals=False)) as runtime:
        component = runtime.namespace("t").component("c")
        for number in range(count):
            await component.publish("e", number)
        print("published", runtime.instance_id, flush=True)

asyncio.run(main(int(sys.argv[1])))
"""

# Subscribes, forks a child that outlives it, and says both ids.
FORKS = """
import asyncio, os
from triton_distributed.config import Config
from triton_distributed.runtime import DistributedRuntime

async def main():
    runtime = DistributedRuntime(config=Config.from_env(handle_signals=False))
    component = runtime.namespace("t").component("c")
    subscription = await component.subscribe("e")
    other = await component.subscribe("other")
    await component.publish("e", 0)
    assert (await subscription.get()).data == 0
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        other.close()
        try:
            component.subscribe("e")
        except BaseException as error:
            os.write(write, type(error).__name__.encode())
        os.read(0, 1)  # until the test lets go of the pipe
        os._exit(0)
    refused = os.read(read, 100).decode()
    print("ready", child, refused, flush=True)
    print("got", (await subscription.get()).data, flush=True)
    print("got", (await other.get()).data, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def subscriber(folder: Path, **environment: str) -> AbstractAsyncContextManager[Program]:
    return program(folder, SUBSCRIBES, environment=environment)


def publisher(folder: Path, count: int, **environment: str) -> AbstractAsyncContextManager[Program]:
    return program(folder, PUBLISHES, str(count), environment=environment)
