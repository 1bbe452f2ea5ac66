import json
import uuid
from contextlib import asynccontextmanager

import gateway_pb2
import gateway_pb2_grpc
import grpc
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel

STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 422,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 503,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}


class Prompt(BaseModel):
    text: str
    words: int = 5

    def message(self):
        return gateway_pb2.Prompt(text=self.text, words=self.words)


class Count(BaseModel):
    words: int


@asynccontextmanager
async def lifespan(app):
    async with grpc.aio.insecure_channel("localhost:50051") as channel:
        app.state.model = gateway_pb2_grpc.ModelStub(channel)
        yield


app = FastAPI(lifespan=lifespan)


@app.exception_handler(grpc.aio.AioRpcError)
async def failed(request: Request, error: grpc.aio.AioRpcError):
    status = STATUS.get(error.code(), 500)
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse({"detail": error.code().name}, status, headers)


@app.middleware("http")
async def request_ids(request: Request, call_next):
    request.state.id = request.headers.get("x-request-id") or uuid.uuid4().hex
    response = await call_next(request)
    response.headers["x-request-id"] = request.state.id
    return response


@app.post("/count")
async def count(prompt: Prompt, request: Request) -> Count:
    metadata = (("request-id", request.state.id),)
    counted = await request.app.state.model.Count(prompt.message(), timeout=5, metadata=metadata)
    return Count(words=counted.words)


@app.post("/generate")
async def generate(prompt: Prompt, request: Request) -> Response:
    metadata = (("request-id", request.state.id),)
    call = request.app.state.model.Generate(prompt.message(), timeout=60, metadata=metadata)
    first = await call.read()  # a refusal is raised here, before the status is sent
    return StreamingResponse(events(call, first), media_type="text/event-stream")


async def events(call, token):
    try:
        while token is not grpc.aio.EOF:
            yield f"data: {json.dumps({'text': token.text})}\n\n"
            token = await call.read()
        yield "data: [DONE]\n\n"
    except grpc.aio.AioRpcError as error:
        yield f"event: error\ndata: {json.dumps({'detail': error.code().name})}\n\n"
    finally:
        call.cancel()


if __name__ == "__main__":
    uvicorn.run(app, port=8000)
