# Run it: serve run app:gateway
import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle


@dataclass
class Prompt:
    text: str
    words: int = 5


@dataclass
class Token:
    text: str


@dataclass
class Count:
    words: int


@serve.deployment
class Counter:
    def count(self, prompt: Prompt) -> Count:
        return Count(len(prompt.text.split()))


@serve.deployment(max_ongoing_requests=32)
class Model:
    async def generate(self, prompt: Prompt) -> AsyncIterator[Token]:
        for number in range(prompt.words):
            await asyncio.sleep(0.02)
            yield Token(f"{prompt.text}-{number}")


app = FastAPI()
UNAVAILABLE = {"Retry-After": "1"}


@app.exception_handler(BackPressureError)
@app.exception_handler(DeploymentUnavailableError)
async def unavailable(request: Request, error: Exception) -> Response:
    return Response(str(error), 503, headers=UNAVAILABLE)


@app.exception_handler(TimeoutError)
async def too_late(request: Request, error: Exception) -> Response:
    return Response("deadline exceeded", 504)


@serve.deployment
@serve.ingress(app)
class Gateway:
    def __init__(self, counter: DeploymentHandle, model: DeploymentHandle) -> None:
        self.counter = counter
        self.model = model.options(stream=True)

    @app.post("/count")
    async def count(self, prompt: Prompt) -> Count:
        async with asyncio.timeout(5):
            return await self.counter.count.remote(prompt)

    @app.post("/generate")
    async def generate(self, prompt: Prompt) -> Response:
        tokens = aiter(self.model.generate.remote(prompt))
        try:
            first = await anext(tokens)  # a refusal is raised here, before the status is sent
        except StopAsyncIteration:
            raise HTTPException(502, "no token") from None
        return StreamingResponse(self.events(first, tokens), media_type="text/event-stream")

    @staticmethod
    async def events(first: Token, tokens: AsyncIterator[Token]) -> AsyncIterator[str]:
        yield f"data: {json.dumps(asdict(first))}\n\n"
        try:
            async with asyncio.timeout(60):
                async for token in tokens:
                    yield f"data: {json.dumps(asdict(token))}\n\n"
        except RequestCancelledError:
            raise
        except Exception as error:
            yield f"event: error\ndata: {json.dumps({'detail': type(error).__name__})}\n\n"
        else:
            yield "data: [DONE]\n\n"


gateway = Gateway.bind(Counter.bind(), Model.bind())
