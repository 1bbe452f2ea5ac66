"""Starlette on uvicorn with server-sent events, and aiohttp's client: HTTP/1.1 over a Unix socket, bodies as JSON.

An array is the body of the request and of a plain response. uvicorn runs with httptools on uvloop and writes no access
log. The client parses the events by itself, several of a piece at once, since aiohttp has no parser for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
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


def _endpoint(handler: Handler) -> Any:
    async def events(items: AsyncIterator[Any]) -> AsyncIterator[bytes]:
        async for item in items:
            yield b"data: %b\n\n" % encode(item)

    async def endpoint(request: Request) -> Response:
        body = await request.body()
        if request.headers["content-type"] == BYTES:
            async for array in handler(np.frombuffer(body, np.float32)):
                return Response(array.data.cast("B"), media_type=BYTES)
        return StreamingResponse(events(handler(decode(body))), media_type=EVENTS)

    return endpoint


class ServerSentEvents:
    """A server, or a session for each service that is called."""

    def __init__(self, directory: Path, tcp: bool) -> None:
        self.directory = directory
        self.sessions: dict[str, aiohttp.ClientSession] = {}
        self.servers: list[tuple[uvicorn.Server, asyncio.Task[None]]] = []

    async def serve(self, service: str, handlers: dict[str, Handler]) -> None:
        routes = [Route(f"/{name}", _endpoint(handler), methods=["POST"]) for name, handler in handlers.items()]
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
            if isinstance(request, np.ndarray):
                async with session.post(url, data=request.data.cast("B"), headers=BYTES_SENT) as response:
                    yield np.frombuffer(await response.read(), np.float32)
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
