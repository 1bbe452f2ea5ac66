"""The second of three stages: changes the request on its way down, and each word on its way up.

python examples/pipeline/middle.py
"""

import uvloop

from triton_distributed.runtime import Client, DistributedRuntime, triton_worker


class Middle:
    """Calls the backend and passes on each item as it arrives."""

    def __init__(self, backend: Client):
        self.backend = backend

    async def generate(self, request):
        print(f"Middle received: {request}", flush=True)
        async for word in self.backend.generate(f"{request} from the middle", annotated=False):
            yield word.upper()


@triton_worker()
async def worker(runtime: DistributedRuntime):
    namespace = runtime.namespace("examples/pipeline")
    backend = await namespace.component("backend").endpoint("generate").client()
    await backend.wait_for_instances()
    await namespace.component("middle").endpoint("generate").serve_endpoint(Middle(backend).generate)


if __name__ == "__main__":
    uvloop.run(worker())
