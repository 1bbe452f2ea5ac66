"""A worker that answers a text with its characters, one at a time.

    python examples/hello_world/server.py

Start it in one shell or in several: the client finds all servers, and no server needs to know the others.
"""

import uvloop

from triton_distributed.runtime import DistributedRuntime, triton_worker


class RequestHandler:
    """Takes a text and streams its characters."""

    async def generate(self, request):
        print(f"Received request: {request}", flush=True)
        for char in request:
            yield char


@triton_worker()
async def worker(runtime: DistributedRuntime):
    endpoint = runtime.namespace("triton-init").component("backend").endpoint("generate")
    print(f"Started server instance {endpoint.instance_id()}", flush=True)
    await endpoint.serve_endpoint(RequestHandler().generate)


if __name__ == "__main__":
    uvloop.run(worker())
