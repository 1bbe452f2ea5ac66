"""Starlette on uvicorn with server-sent events, and aiohttp's client: HTTP/1.1 over a Unix socket, bodies as JSON.

A call of one item gets a plain response, and an array is the body of the request and of the response. uvicorn runs with
httptools on uvloop and writes no access log. The client parses the events by itself, since aiohttp cannot.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from benchmarks.handlers import Call, Handler

BYTES = "application/octet-stream"
EVENTS = "text/event-stream"
BYTES_SENT, JSON_SENT = {"Content-Type": BYTES}, {"Content-Type": "application/json"}
encode, decode = msgspec.json.Encoder().encode, msgspec.json.Decoder().decode


def _array(body: bytes) -> Any:
    import numpy as np  # Not above, so that hello world does not pay for it.

    return np.frombuffer(body, np.float32)


def _streaming(handler: Handler) -> Any:
    async def events(items: AsyncIterator[Any]) -> AsyncIterator[bytes]:
        async for item in items:
            yield b"data: %b\n\n" % encode(item)

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(events(handler(decode(await request.body()))), media_type=EVENTS)

    return endpoint


def _unary(handler: Handler) -> Any:
    async def endpoint(request: Request) -> Response:
        body, kind = await request.body(), request.headers["content-type"]
        async for item in handler(_array(body) if kind == BYTES else decode(body)):
            return Response(item.data.cast("B") if kind == BYTES else encode(item), media_type=kind)
        raise ValueError("the handler has no item")

    return endpoint


class ServerSentEvents:
    """A server, or a session for each service that is called."""

    def __init__(self, directory: Path, tcp: bool) -> None:
        self.directory = directory
        self.sessions: dict[str, aiohttp.ClientSession] = {}
        self.servers: list[tuple[uvicorn.Server, asyncio.Task[None]]] = []

    async def serve(self, service: str, handlers: dict[str, Handler]) -> None:
        routes = [Route(f"/{name}", _streaming(handler), methods=["POST"]) for name, handler in handlers.items()]
        routes += [Route(f"/{name}/one", _unary(handler), methods=["POST"]) for name, handler in handlers.items()]
        config = uvicorn.Config(
            Starlette(routes=routes), uds=str(self.directory / service), http="httptools", log_level="warning",
            access_log=False,
        )  # fmt: skip
        server = uvicorn.Server(config)
        self.servers.append((server, asyncio.ensure_future(server.serve())))
        while not server.started:
            await asyncio.sleep(0.001)

    async def connect(self, service: str, handler: str) -> Call:
        if service not in self.sessions:
            connector = aiohttp.UnixConnector(str(self.directory / service), limit=0)
            timeout = aiohttp.ClientTimeout(total=None)
            self.sessions[service] = aiohttp.ClientSession(connector=connector, timeout=timeout)
        session, url = self.sessions[service], f"http://localhost/{handler}"

        async def call(request: Any) -> AsyncIterator[Any]:
            if not isinstance(request, dict):
                async with session.post(f"{url}/one", data=request.data.cast("B"), headers=BYTES_SENT) as response:
                    yield _array(await response.read())
                return
            if request.get("n") == 1:
                async with session.post(f"{url}/one", data=encode(request), headers=JSON_SENT) as response:
                    yield decode(await response.read())
                return
            async with session.post(url, data=encode(request), headers=JSON_SENT) as response:
                rest = b""
                async for piece in response.content.iter_any():
                    *events, rest = (rest + piece).split(b"\n\n")
                    for event in events:
                        yield decode(event[6:])

        return call

    async def close(self) -> None:
        """Close the sessions."""
        for session in self.sessions.values():
            await session.close()


make = ServerSentEvents
