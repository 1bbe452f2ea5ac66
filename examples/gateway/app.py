"""An HTTP gateway in front of the workers: a JSON answer, and a stream of server-sent events.

    python examples/gateway/app.py 8000                  (or: uvicorn app:app)
    curl localhost:8000/count -d '{"text": "to be or not"}' -H 'content-type: application/json'
    curl -N localhost:8000/generate -d '{"text": "hi"}' -H 'content-type: application/json'

Start workers in other shells, before or after this.
"""

import sys

import uvicorn
from contracts import COUNT, GENERATE, Count, Prompt
from fastapi import FastAPI, Response

from triton_distributed import fastapi as trd_fastapi

app = FastAPI(lifespan=trd_fastapi.lifespan())
trd_fastapi.install(app)


@app.post("/count")
async def count(prompt: Prompt, here: trd_fastapi.Here) -> Count:
    return await here.call(COUNT, prompt, timeout=5, idempotent=True)


@app.post("/generate")
async def generate(prompt: Prompt, here: trd_fastapi.Here) -> Response:
    tokens = here.stream(GENERATE, prompt, timeout=60, resume=True)
    return await trd_fastapi.sse(tokens, last="[DONE]")


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
