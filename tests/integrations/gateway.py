"""An app behind a real uvicorn, in the event loop of the test, and workers in memory beside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

import triton_distributed as trd
from tests.runtime.cluster import patiently, until
from tests.timing import PATIENCE_S

MEMORY = trd.Config(discovery="memory", watchdog_s=PATIENCE_S)


@dataclass
class Ask:
    text: str
    count: int = 3


@dataclass
class Token:
    text: str
    number: int = 0


ECHO = trd.Unary[Ask, Token]("t.http.echo")
TOKENS = trd.Stream[Ask, Token]("t.http.tokens")


class Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # The test's process keeps its signal handlers.

    @property
    def port(self) -> int:
        return int(self.servers[0].sockets[0].getsockname()[1])


@asynccontextmanager
async def serving(app: Any, **options: Any) -> AsyncIterator[Server]:
    """Serve an app on a free port of loopback until the block ends."""
    server = Server(uvicorn.Config(app, port=0, lifespan="on", log_config=None, **options))
    task = asyncio.create_task(server.serve())
    try:
        await until(lambda: server.started or task.done())
        assert server.started, "the app did not start"
        yield server
    finally:
        server.should_exit = True
        await patiently(task)


def browser_of(server: Server) -> httpx.AsyncClient:
    """A client of a server, for any number of requests at once."""
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{server.port}", timeout=PATIENCE_S, limits=limits, trust_env=False
    )


@asynccontextmanager
async def browsing(app: Any, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app that is served for it."""
    async with serving(app, **options) as server, browser_of(server) as client:
        yield client


class RawClient:
    """A client that sees each byte, and leaves when the test says so."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def until(self, text: bytes) -> bytes:
        return await patiently(self.reader.readuntil(text))

    def leave(self) -> None:
        self.writer.transport.abort()


@asynccontextmanager
async def asking(
    server: Server, path: str, body: bytes = b'{"text":"a"}', limit: int = 2**16, headers: str = ""
) -> AsyncIterator[RawClient]:
    """Post a body and leave at the end of the block."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=limit)
    head = f"POST {path} HTTP/1.1\r\n{headers}host: t\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    try:
        yield RawClient(reader, writer)
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()
