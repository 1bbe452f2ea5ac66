"""Ray: plain actors, and Ray Serve's handles in its mode for throughput.

One node with the least processes that Ray starts: no dashboard, no proxy. The client is the driver, and Ray's own
processes run the handlers, so there is no worker process of the benchmark. A call of one item awaits the result of a
method, a stream iterates a streaming one. Ray listens on all interfaces; a token that only its processes know keeps
others out.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve

from benchmarks.handlers import WORK, Call, Handler, innermost, relay

ADDRESS = "ray.address"
LOOPBACK = "127.0.0.1"
STORE_BYTES = 256 << 20
MOST_CALLS = 10_000


@asynccontextmanager
async def around(directory: Path) -> AsyncIterator[None]:
    """Run the node."""
    _join(
        _node_ip_address=LOOPBACK,
        _temp_dir=str(directory / "ray"),
        include_dashboard=False,
        object_store_memory=STORE_BYTES,
    )
    (directory / ADDRESS).write_text(ray.get_runtime_context().gcs_address)
    try:
        yield
    finally:
        ray.shutdown()


def _join(**options: Any) -> None:
    ray.init(
        namespace="bench", configure_logging=False, log_to_driver=False, logging_level=logging.ERROR, **options
    )  # fmt: skip


class Hop:
    """What runs in a process of Ray: all handlers, or one of a chain, that passes on or is the last."""

    def __init__(self, following: Any = None, last: bool = False) -> None:
        self.ended: asyncio.Queue[float] = asyncio.Queue()
        self.handlers: dict[str, Handler] = dict(WORK)
        if following is not None:
            self.handlers["hop"] = relay(_calls(following, "hop"))
        elif last:
            self.handlers["hop"] = innermost(self.ended)

    async def items(self, name: str, request: Any) -> AsyncIterator[Any]:
        async for item in self.handlers[name](request):
            yield item

    async def one(self, name: str, request: Any) -> Any:
        async for item in self.handlers[name](request):
            return item
        raise ValueError(f"{name} has no item")

    async def has_ended(self) -> float:
        return await self.ended.get()


def _calls(target: Any, name: str) -> Call:
    """Return a function that calls an actor, or a deployment by its handle."""
    if isinstance(target, serve.handle.DeploymentHandle):
        streaming = target.options(stream=True).items
        large = target.options(_by_reference=True).one  # Through Ray's shared memory; small values take gRPC.
    else:
        streaming = target.items.options(num_returns="streaming")
        large = target.one

    async def one(request: Any) -> AsyncIterator[Any]:
        yield await (target.one if isinstance(request, dict) else large).remote(name, request)

    async def items(request: Any) -> AsyncIterator[Any]:
        answer = streaming.remote(name, request)
        try:
            async for item in answer:
                yield await item if isinstance(item, ray.ObjectRef) else item
        finally:
            if isinstance(answer, ray.ObjectRefGenerator):
                ray.cancel(answer)
            else:
                answer.cancel()

    def call(request: Any) -> AsyncIterator[Any]:
        return one(request) if not isinstance(request, dict) or request.get("n") == 1 else items(request)

    return call


class Hosted:
    """Stands for the worker process that Ray has in place of ours."""

    def __init__(self, target: Any) -> None:
        self.target = target

    async def ask(self, question: str) -> Any:
        if question != "ended":
            raise ValueError(f"unknown question {question!r}")
        return await self.target.has_ended.remote()


class Actors:
    """Plain actors."""

    def __init__(self, directory: Path, tcp: bool) -> None:
        self.directory = directory
        self.entry: Any = None
        self.started = 0

    def _start(self, following: Any, last: bool) -> Any:
        options = ray.remote(Hop).options(name=self._name(), max_concurrency=MOST_CALLS)
        return options.remote(following, last)

    def _name(self) -> str:
        self.started += 1
        return f"hop{self.started}"

    def _find(self) -> Any:
        return ray.get_actor("hop1")

    async def host(self, shape: str) -> list[Hosted]:
        """Start what runs the handlers, one or a chain."""
        innermost = self.entry = self._start(None, shape == "chain")
        if shape == "chain":
            self.entry = self._start(self._start(innermost, False), False)
        return [Hosted(innermost)]

    async def connect(self, service: str, handler: str) -> Call:
        if self.entry is None:
            _join(address=(self.directory / ADDRESS).read_text())
            self.entry = self._find()
        return _calls(self.entry, handler)


class Serve(Actors):
    """Deployments, called by their handles."""

    def _start(self, following: Any, last: bool) -> Any:
        name = self._name()
        deployment = serve.deployment(Hop).options(
            name=name, max_ongoing_requests=MOST_CALLS, ray_actor_options={"num_cpus": 0}
        )
        return serve.run(deployment.bind(following, last), name=name, route_prefix=None)

    def _find(self) -> Any:
        return serve.get_app_handle("hop1")

    async def host(self, shape: str) -> list[Hosted]:
        serve.start(proxy_location="Disabled")
        return await super().host(shape)


def make(directory: Path, tcp: bool) -> Actors:
    return Serve(directory, tcp) if "RAY_SERVE_THROUGHPUT_OPTIMIZED" in os.environ else Actors(directory, tcp)
