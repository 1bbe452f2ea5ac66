"""A worker on one host. Prints its instance id when it can be called, then which handlers are cancelled; SIGTERM drains it."""

import asyncio
import itertools
import os
import sys

from triton_distributed.runtime import DistributedRuntime, triton_worker

NAME = os.uname().nodename


async def echo(request):
    yield f"{NAME}: {request}"


async def count(request):
    """So many numbers, one every so many seconds."""
    numbers, pause_s = request
    try:
        for number in range(numbers):
            yield number
            await asyncio.sleep(pause_s)
    except asyncio.CancelledError:
        print('"cancelled"', flush=True)
        raise


async def tick(runtime):
    """An event every 50 ms."""
    component = runtime.namespace("hosts").component("all")
    for number in itertools.count():
        await component.publish("ticks", {"from": NAME, "number": number})
        await asyncio.sleep(0.05)


@triton_worker()
async def worker(runtime: DistributedRuntime):
    serving = [
        runtime.endpoint(f"hosts.{NAME if 'apart' in sys.argv else 'all'}.{each.__name__}").serve_endpoint(each)
        for each in (echo, count)
    ]
    print(runtime.instance_id, flush=True)
    ticking = asyncio.create_task(tick(runtime)) if "NATS_SERVER" in os.environ else None
    await asyncio.gather(*serving)
    if ticking is not None:
        ticking.cancel()


if __name__ == "__main__":
    asyncio.run(worker())
