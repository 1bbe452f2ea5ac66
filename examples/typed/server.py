"""Requests and answers with types: one handler with `triton_endpoint` and pydantic, one with plain annotations.

    pip install pydantic                 # optional: only needed for its models
    python examples/typed/server.py

Then run client.py in another shell.
"""

import asyncio

import uvloop
from models import Numbers, Summary, Text, Word

from triton_distributed.runtime import DistributedRuntime, triton_endpoint, triton_worker


class RequestHandler:
    """Its handlers get requests of the annotated types, or are not called at all."""

    @triton_endpoint(Text, Word)
    async def words(self, request):
        """Take a Text, or a dict or JSON text that fits it."""
        for place, word in enumerate(request.text.split()[: request.max_words], 1):
            yield Word(place=place, word=word)

    async def summary(self, request: Numbers) -> Summary:
        """Take the annotated type; dataclasses and Structs need no decorator."""
        return Summary(count=len(request.values), mean=sum(request.values) / len(request.values))


@triton_worker()
async def worker(runtime: DistributedRuntime):
    component = runtime.namespace("examples").component("typed")
    handler = RequestHandler()
    await asyncio.gather(
        component.endpoint("words").serve_endpoint(handler.words),
        component.endpoint("summary").serve_endpoint(handler.summary),
    )


if __name__ == "__main__":
    uvloop.run(worker())
