"""Dynamo's front ends through its Python bindings: `python -m benchmarks.llm.on_dynamo KIND PORT FOLDER SPEED`.

- `worker`: serves each workload's model, whose files are in FOLDER, and answers with token ids.
- `mocker`: a worker with Dynamo's own mock engine, in Rust, SPEED times as fast as the engine that it simulates.
- `front`: Dynamo's front end for such workers, with its template, tokenizer and router.
- `echo`: the same front end with Dynamo's own echo engine inside, in Rust. It answers one character at a time.
- `service`: `HttpService` with an engine in Python inside, which makes the chunks itself.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvloop
from dynamo.llm import (
    EngineType,
    EntrypointArgs,
    HttpAsyncEngine,
    HttpService,
    ModelInput,
    ModelType,
    WorkerType,
    make_engine,
    register_model,
    run_input,
)
from dynamo.runtime import DistributedRuntime

from benchmarks.llm.steps import Gaps, Steps
from benchmarks.llm.work import EVERY, Work

Handler = Callable[..., AsyncIterator[dict[str, Any]]]
LETTER = 64  # The id of the letter a.
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ENDPOINT = "bench.mocker.generate"
gaps = Gaps()


def of_tokens(work: Work) -> Handler:
    """A worker's handler: the answer as token ids."""
    steps = Steps(work.step_s, gaps)
    ids = [LETTER + number % len(LETTERS) for number in range(work.tokens)]

    async def handler(request: dict[str, Any], context: Any = None) -> AsyncIterator[dict[str, Any]]:
        if not work.each:
            yield {"token_ids": ids, "finish_reason": "length"}
            return
        for each in ids[:-1]:
            if work.step_s:
                await steps.wait()
            yield {"token_ids": [each]}
        yield {"token_ids": ids[-1:], "finish_reason": "length"}

    return handler


def of_chunks(work: Work) -> Handler:
    """An engine's handler: the answer as chunks of the OpenAI API."""
    steps = Steps(work.step_s, gaps)
    text = "".join(LETTERS[number % len(LETTERS)] for number in range(work.tokens))
    parts = list(text) if work.each else [text]

    async def handler(request: dict[str, Any], context: Any = None) -> AsyncIterator[dict[str, Any]]:
        made = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": int(time.time()), "model": work.name}
        for number, part in enumerate(parts, 1):
            if work.step_s:
                await steps.wait()
            delta = {"role": "assistant", "content": part}
            reason = "length" if number == len(parts) else None
            yield {**made, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}

    return handler


async def main(kind: str, port: int, folder: str, speed: float) -> None:
    loop = asyncio.get_running_loop()
    runtime = DistributedRuntime(loop, "file", "tcp")
    if kind == "worker":
        gaps.write_at_signal()
        serving = []
        for name, work in EVERY.items():
            endpoint = runtime.endpoint(f"bench.{name}.generate")
            kinds = (ModelInput.Tokens, ModelType.Chat)
            await register_model(*kinds, endpoint, folder, name, worker_type=WorkerType.Aggregated)
            serving.append(endpoint.serve_endpoint(of_tokens(work)))
        await asyncio.gather(*serving)
    elif kind == "service":
        service = HttpService(port=port)
        for name, work in EVERY.items():
            service.add_chat_completions_model(name, "1", HttpAsyncEngine(of_chunks(work), loop))
        service.enable_endpoint("chat", True)
        gaps.write_at_signal()
        await service.run(runtime)
    else:
        model = {} if kind == "front" else {"model_path": folder, "model_name": kind}
        if kind == "mocker":
            fast = {"engine": {"speedup_ratio": speed}}
            arguments = EntrypointArgs(EngineType.Mocker, endpoint_id=ENDPOINT, mocker_engine_args=fast, **model)
        else:
            engine = EngineType.Echo if kind == "echo" else EngineType.Dynamic
            arguments = EntrypointArgs(engine, http_host="127.0.0.1", http_port=port, **model)
        path = f"dyn://{ENDPOINT}" if kind == "mocker" else "http"
        await run_input(runtime, path, await make_engine(runtime, arguments))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])))
