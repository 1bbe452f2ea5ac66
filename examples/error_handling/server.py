"""A kitchen where things go wrong: the caller catches the error that the handler raises.

    python examples/error_handling/server.py

Then run client.py in another shell.
"""

import asyncio

import uvloop
from menu import SoldOut

from triton_distributed.runtime import DistributedRuntime, triton_worker

STEPS = {"soup": ["chop", "simmer", "serve"], "stew": ["brown", "braise", "serve"]}
BRAISING_S = 0.1


class Kitchen:
    """Cooks a dish, step by step."""

    async def cook(self, dish):
        yield "light the stove"
        if dish == "cake":
            raise SoldOut("cake", tomorrow=12)
        if dish == "water":
            raise ZeroDivisionError("cannot cook zero ingredients")
        for step in STEPS[dish]:  # raises KeyError for an unknown dish
            if step == "braise":
                await asyncio.sleep(BRAISING_S)
            yield step


@triton_worker()
async def worker(runtime: DistributedRuntime):
    endpoint = runtime.endpoint("examples.kitchen.cook")
    # There is one stove: a second dish at the same time is refused at once, and goes to another kitchen if there is one.
    await endpoint.serve_endpoint(Kitchen().cook, max_inflight=1)


if __name__ == "__main__":
    uvloop.run(worker())
