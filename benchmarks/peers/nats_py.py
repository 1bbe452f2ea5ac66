"""nats-py over a real NATS server: a call of one item is a plain request, a stream is published to the caller's inbox.

The values travel as msgpack. An empty message ends a stream. The limit of a message is raised, because the server's
default of 1 MiB refuses the array, and so is the limit of the client's buffer, which must hold it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from benchmarks.handlers import Call, Handler
from benchmarks.peers.codec import decode, encode
from benchmarks.peers.places import free_port, wait_until_open

LARGEST_BYTES = 32 << 20
SERVER_OPTIONS = f"max_payload: {LARGEST_BYTES}\nmax_pending: {2 * LARGEST_BYTES}\n"
CLIENT_OPTIONS: dict[str, Any] = {"pending_size": 2 * LARGEST_BYTES, "skip_subject_validation": True}
TIMEOUT_S = 30.0


@asynccontextmanager
async def around(directory: Path) -> AsyncIterator[None]:
    """Run the server that both ends need."""
    port = free_port()
    config = directory / "nats.conf"
    config.write_text(f"listen: 127.0.0.1:{port}\n{SERVER_OPTIONS}")
    program = Path(sys.executable).parent / "nats-server"
    server = await asyncio.create_subprocess_exec(
        program, "-c", config, "-l", directory / "nats.log", stdout=asyncio.subprocess.DEVNULL
    )
    try:
        await wait_until_open("127.0.0.1", port)
        (directory / "nats.address").write_text(f"nats://127.0.0.1:{port}")
        yield
    finally:
        server.terminate()
        await server.wait()


class NatsPy:
    """One connection in each process."""

    def __init__(self, directory: Path, tcp: bool) -> None:
        self.directory = directory
        self.client: Client | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        self.streams: dict[str, asyncio.Queue[bytes]] = {}
        self.inbox = f"_INBOX.{os.getpid()}"
        self.calls = itertools.count()

    async def _connected(self) -> Client:
        if self.client is None:
            address = (self.directory / "nats.address").read_text()
            self.client = await nats.connect(address, **CLIENT_OPTIONS)
            await self.client.subscribe(f"{self.inbox}.*", cb=self._arrived)
        return self.client

    async def serve(self, service: str, handlers: dict[str, Handler]) -> None:
        client = await self._connected()
        for name, handler in handlers.items():
            await client.subscribe(f"{service}.{name}", cb=self._in_tasks(handler, _publish))
            await client.subscribe(f"{service}.{name}.one", cb=self._in_tasks(handler, _respond))
        await client.flush()

    def _in_tasks(
        self, handler: Handler, answer: Callable[[Handler, Client, Msg], Awaitable[None]]
    ) -> Callable[[Msg], Awaitable[None]]:
        # A subscription waits for its callback before it takes the next message.
        async def callback(message: Msg) -> None:
            assert self.client is not None
            task = asyncio.ensure_future(answer(handler, self.client, message))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

        return callback

    async def connect(self, service: str, handler: str) -> Call:
        client = await self._connected()
        subject = f"{service}.{handler}"

        def call(request: Any) -> AsyncIterator[Any]:
            if isinstance(request, dict) and request.get("n") != 1:
                return self._stream(client, subject, request)
            return _request(client, f"{subject}.one", request)

        return call

    async def close(self) -> None:
        """Close the connection before the server ends."""
        if self.client is not None:
            await self.client.close()

    async def _stream(self, client: Client, subject: str, request: Any) -> AsyncIterator[Any]:
        inbox = f"{self.inbox}.{next(self.calls)}"
        items = self.streams[inbox] = asyncio.Queue()
        try:
            await client.publish(subject, encode(request), reply=inbox)
            while item := await items.get():
                yield decode(item)
        finally:
            del self.streams[inbox]

    async def _arrived(self, message: Msg) -> None:
        self.streams[message.subject].put_nowait(message.data)


async def _request(client: Client, subject: str, request: Any) -> AsyncIterator[Any]:
    yield decode((await client.request(subject, encode(request), timeout=TIMEOUT_S)).data)


async def _respond(handler: Handler, client: Client, message: Msg) -> None:
    async for item in handler(decode(message.data)):
        await message.respond(encode(item))


async def _publish(handler: Handler, client: Client, message: Msg) -> None:
    async for item in handler(decode(message.data)):
        await client.publish(message.reply, encode(item))
    await client.publish(message.reply)


make = NatsPy
