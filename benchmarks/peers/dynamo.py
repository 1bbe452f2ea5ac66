"""Dynamo through its Python bindings: discovery by files, requests over TCP, bodies as msgpack, log off.

A handler yields its items, or pushes them into a `response_sender`, which is Dynamo's faster path: `Pushed`. An array
is sent as bytes. Dynamo tells a handler that its caller has gone, and does not cancel it. So the hops of a cancellation
wait for that as well as for their items, and pass their context on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from dynamo.runtime import Context, DistributedRuntime

from benchmarks.handlers import Call, Handler

HOP = "hop"
NOTHING: tuple[Any, ...] = ()
_current: ContextVar[Context | None] = ContextVar("current", default=None)


class Dynamo:
    """One runtime in each process."""

    def __init__(self, directory: Path, tcp: bool) -> None:
        self.runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
        self.serving: list[asyncio.Future[None]] = []

    def _prepared(self, name: str, handler: Handler) -> Any:
        if name == HOP:
            return _told(handler)
        return _of_bytes(handler) if name == "echo" else handler

    async def serve(self, service: str, handlers: dict[str, Handler]) -> None:
        for name, handler in handlers.items():
            endpoint = self.runtime.endpoint(f"bench.{service}.{name}")
            self.serving.append(asyncio.ensure_future(endpoint.serve_endpoint(self._prepared(name, handler))))
        for name in handlers:
            await self.connect(service, name)

    async def connect(self, service: str, handler: str) -> Call:
        client = await self.runtime.endpoint(f"bench.{service}.{handler}").client()
        await client.wait_for_instances()

        async def call(request: Any) -> AsyncIterator[Any]:
            async for item in await client.generate(request, annotated=False):
                yield item

        async def call_with_bytes(request: Any) -> AsyncIterator[Any]:
            async for item in await client.generate(_pack(request), annotated=False):
                yield _unpack(item)

        async def call_with_context(request: Any) -> AsyncIterator[Any]:
            context = _current.get() or Context()
            try:
                async for item in await client.generate(request, annotated=False, context=context):
                    yield item
            finally:
                context.stop_generating()

        return {"echo": call_with_bytes, HOP: call_with_context}.get(handler, call)


class Pushed(Dynamo):
    """As `Dynamo`, with handlers that push."""

    def _prepared(self, name: str, handler: Handler) -> Any:
        items = _of_bytes(handler) if name == "echo" else handler

        async def push(request: Any, context: Context, response_sender: Any = None) -> AsyncIterator[Any]:
            async for item in items(request):
                response_sender.send(item)
            response_sender.close()
            for nothing in NOTHING:  # It must be an asynchronous generator.
                yield nothing

        return push


def _pack(value: Any) -> Any:
    return {"float32": value.tobytes()}


def _unpack(value: Any) -> Any:
    import numpy as np  # Not above, so that hello world does not pay for it.

    return np.frombuffer(value["float32"], np.float32)


def _of_bytes(handler: Handler) -> Handler:
    async def converted(request: Any) -> AsyncIterator[Any]:
        async for item in handler(_unpack(request)):
            yield _pack(item)

    return converted


def _told(handler: Handler) -> Any:
    """A handler that ends when its context is stopped."""

    async def told(request: Any, context: Context) -> AsyncIterator[Any]:
        _current.set(context)
        stopped = asyncio.ensure_future(context.async_killed_or_stopped())
        items = handler(request)
        try:
            while True:
                step = asyncio.ensure_future(anext(items, None))
                await asyncio.wait((step, stopped), return_when=asyncio.FIRST_COMPLETED)
                if not step.done():
                    step.cancel()
                    await asyncio.wait((step,))
                    return
                if (item := step.result()) is None:
                    return
                yield item
        finally:
            stopped.cancel()

    return told


def make(directory: Path, tcp: bool) -> Dynamo:
    return Dynamo(directory, tcp)
