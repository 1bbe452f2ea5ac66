"""The last of three stages: takes a text and streams its words.

python examples/pipeline/backend.py
"""

import uvloop

from triton_distributed.runtime import DistributedRuntime, triton_worker


class Backend:
    """Does the work."""

    async def generate(self, request):
        print(f"Backend received: {request}", flush=True)
        for word in request.split():
            yield word


@triton_worker()
async def worker(runtime: DistributedRuntime):
    component = runtime.namespace("examples/pipeline").component("backend")
    await component.endpoint("generate").serve_endpoint(Backend().generate)


if __name__ == "__main__":
    uvloop.run(worker())
