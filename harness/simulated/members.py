"""The processes on simulated hosts: workers and clients, each with its own runtime."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

from harness.requests import ENDPOINT, TWO_WAY, echo, handler
from harness.simulated.hosts import Host
from harness.simulated.network import HostDiscovery, HostNetwork, Registry, Switch
from triton_distributed.config import Config
from triton_distributed.runtime import Client, DistributedRuntime


class Member:
    """A process with a runtime.

    Attributes:
        host: the host on which it runs.
        runtime: its runtime.
    """

    def __init__(self, host: Host, switch: Switch, registry: Registry, config: Config) -> None:
        self.host = host
        self._switch = switch
        self._registry = registry
        self.discovery = HostDiscovery(registry, host)
        self.runtime: DistributedRuntime = host.context.run(self._make, config)

    def _make(self, config: Config) -> DistributedRuntime:
        networks = {"memory": HostNetwork(self._switch, self.host)}
        return DistributedRuntime(config=config, discovery=self.discovery, networks=networks)

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        """Run a coroutine in this process."""
        return self.host.loop.create_task(work, context=self.host.context.copy())

    async def close(self) -> None:
        """Shut the runtime down and wait for it."""
        await self.spawn(self.runtime.close())


class Worker(Member):
    """A process that serves `requests.handler` and `requests.echo`.

    Args:
        begun: counts how often a handler began each request; handlers that begin after a kill are not counted.
        max_inflight: the limit of both endpoints, which queue as many requests.
    """

    def __init__(
        self,
        host: Host,
        switch: Switch,
        registry: Registry,
        config: Config,
        begun: Counter[int],
        max_inflight: int | None,
    ) -> None:
        super().__init__(host, switch, registry, config)
        self._begun = begun
        queue = max_inflight or 0
        self.serving: list[asyncio.Task[None]] = [
            host.context.run(self._serve, path, function(self), max_inflight, queue)
            for path, function in ((ENDPOINT, handler), (TWO_WAY, echo))
        ]

    def _serve(self, path: str, function: Callable[..., Any], most: int | None, queue: int) -> asyncio.Task[None]:
        return self.runtime.endpoint(path).serve_endpoint(function, max_inflight=most, max_queue=queue)

    def began(self, request_id: int) -> None:
        """Count a request that a handler begins."""
        if not self.host.dead:
            self._begun[request_id] += 1
            loop = self.host.loop
            loop.trace.note(loop.time(), f"{self.host.name} begins {request_id}")

    async def registered(self) -> bool:
        """Wait until the worker is registered. False if it cannot register."""
        while not any(each.done() for each in self.serving):
            known = [key for key in self._registry.hub.entries if key[1] == self.runtime.instance_id]
            if len(known) == len(self.serving):
                return True
            await asyncio.sleep(0.005)
        return False

    async def leave(self) -> None:
        """Close the worker, and wait until its endpoints have ended."""
        await self.close()
        await asyncio.gather(*self.serving, return_exceptions=True)

    def kill(self) -> None:
        """End the process without notice."""
        self._switch.kill(self.host)

    async def bury(self) -> None:
        """Close the runtime of a killed process. Its actions reach no other process."""
        self.discovery.vanish()
        await self.leave()

    async def pause(self) -> None:
        """Take the worker out of rotation."""
        for path in (ENDPOINT, TWO_WAY):
            await self.spawn(self.runtime.endpoint(path).pause())

    async def resume(self) -> None:
        """Put the worker back into rotation."""
        for path in (ENDPOINT, TWO_WAY):
            await self.spawn(self.runtime.endpoint(path).resume())


class Caller(Member):
    """A process that makes calls.

    Attributes:
        answer: its client of `requests.handler`.
        echo: its client of `requests.echo`.
    """

    answer: Client
    echo: Client

    async def open(self, policy: str) -> None:
        """Make the clients and wait until each knows an instance."""
        await self.spawn(self._open(policy))

    async def _open(self, policy: str) -> None:
        self.answer = await self.runtime.endpoint(ENDPOINT).client(policy)
        self.echo = await self.runtime.endpoint(TWO_WAY).client(policy)
        await self.answer.wait_for_instances()
        await self.echo.wait_for_instances()
