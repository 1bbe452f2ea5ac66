"""The runtime itself with its defaults. The parent process sets `TRD_DIR` and, over TCP, `TRD_LISTEN`."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from benchmarks.handlers import Call, Handler
from triton_distributed.runtime import Client, DistributedRuntime


class Ours:
    """One runtime in each process."""

    def __init__(self, directory: Path, tcp: bool) -> None:
        self.runtime = DistributedRuntime(asyncio.get_running_loop())
        self.serving: list[asyncio.Future[None]] = []

    async def serve(self, service: str, handlers: dict[str, Handler]) -> None:
        component = self.runtime.namespace("bench").component(service)
        await component.create_service()
        for name, handler in handlers.items():
            self.serving.append(asyncio.ensure_future(component.endpoint(name).serve_endpoint(handler)))
        for name in handlers:
            await self.connect(service, name)

    async def connect(self, service: str, handler: str) -> Call:
        client = await self.runtime.endpoint(f"bench.{service}.{handler}").client()
        await client.wait_for_instances()
        if handler == "echo":
            return functools.partial(_one_answer, client)
        return functools.partial(client.generate, annotated=False)


async def _one_answer(client: Client, request: Any) -> AsyncIterator[Any]:
    """Call a handler that has one answer. Unlike a stream, such a call does not copy the arrays of its request."""
    yield await client.call(request)


make = Ours
