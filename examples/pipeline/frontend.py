"""The first of three stages: clients call this one.

python examples/pipeline/frontend.py
"""

import uvloop

from triton_distributed.runtime import Client, DistributedRuntime, triton_worker


class Frontend:
    """Calls the middle stage and numbers its items."""

    def __init__(self, middle: Client):
        self.middle = middle

    async def generate(self, request):
        print(f"Frontend received: {request}", flush=True)
        number = 0
        async for word in self.middle.generate(f"{request} from the front", annotated=False):
            number += 1
            yield f"{number} {word}"


@triton_worker()
async def worker(runtime: DistributedRuntime):
    namespace = runtime.namespace("examples/pipeline")
    middle = await namespace.component("middle").endpoint("generate").client()
    await middle.wait_for_instances()
    await namespace.component("frontend").endpoint("generate").serve_endpoint(Frontend(middle).generate)


if __name__ == "__main__":
    uvloop.run(worker())
