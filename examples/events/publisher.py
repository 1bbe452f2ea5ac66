"""Publishes events of a component: a cache announces the blocks that it has stored.

    python examples/events/publisher.py              # five events, one every half second
    python examples/events/publisher.py 100 0        # a hundred, without a pause

The publisher never waits: without a subscriber the events are lost, and a slow subscriber loses the oldest ones.
"""

import asyncio
import sys

import uvloop

from triton_distributed.runtime import DistributedRuntime, triton_worker


@triton_worker()
async def worker(runtime: DistributedRuntime, count: int, pause_s: float):
    component = runtime.namespace("examples").component("cache")
    for block in range(count):
        await component.publish("stored", {"block": block, "hashes": [block * 16 + i for i in range(16)]})
        await asyncio.sleep(pause_s)
    print(f"Published {count} events as {component.event_subject('stored')}")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    uvloop.run(worker(int(arguments[0]) if arguments else 5, float(arguments[1]) if len(arguments) > 1 else 0.5))
