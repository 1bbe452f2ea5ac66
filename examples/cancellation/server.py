"""Three hops: `outer` calls `middle`, `middle` calls `inner`, and `inner` counts until the caller stops it.

    python examples/cancellation/server.py outer
    python examples/cancellation/server.py middle
    python examples/cancellation/server.py inner

Start each in its own shell, in any order, then client.py.
"""

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import uvloop

from triton_distributed.runtime import Client, Context, DistributedRuntime, triton_worker

NEXT = {"outer": "middle", "middle": "inner"}
COUNTING_S = 0.02


class Relay:
    """Passes on the items of the next hop. Cancellation and deadlines pass by themselves.

    So does a graceful stop, because the handler takes a context. Without one, a graceful stop cancels it.
    """

    def __init__(self, name: str, following: Client):
        self.name, self.following = name, following

    async def count(self, request, context: Context):
        try:
            async for number in self.following.generate(request, annotated=False):
                yield number
        finally:
            print(f"{self.name}: cleaned up after {request}", flush=True)


class Counter:
    """Counts as long as the caller listens."""

    async def count(self, request, context: Context):
        left = context.remaining_s()
        print(f"inner: {request}, " + ("no deadline" if left is None else f"{left:.2f} s left"), flush=True)
        number = 0
        try:
            while not context.is_stopped():  # the caller asked nicely: finish with an answer
                number += 1
                yield number
                await asyncio.sleep(COUNTING_S)
            yield f"stopped after {number}"
        except asyncio.CancelledError:  # the caller left, or its time is over
            print(f"inner: cancelled at {number}", flush=True)
            raise
        finally:
            print(f"inner: cleaned up after {request}", flush=True)


@triton_worker()
async def worker(runtime: DistributedRuntime, name: str):
    component = runtime.namespace("examples").component("cancellation")
    if name in NEXT:
        following = await component.endpoint(NEXT[name]).client()
        await following.wait_for_instances()
        handler: Callable[..., Any] = Relay(name, following).count
    else:
        handler = Counter().count
    await component.endpoint(name).serve_endpoint(handler)


if __name__ == "__main__":
    if sys.argv[1:] not in (["outer"], ["middle"], ["inner"]):
        raise SystemExit("which hop? python examples/cancellation/server.py outer|middle|inner")
    uvloop.run(worker(sys.argv[1]))
