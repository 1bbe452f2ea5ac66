"""Calls of a worker to itself, as other clients make them: over a session, to the addresses that it publishes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton_distributed.calling.candidates import Candidates
from triton_distributed.calling.services import Services
from triton_distributed.context import HIGHEST_PRIORITY
from triton_distributed.discovery import Change, Snapshot
from triton_distributed.observe.observer import Observers
from triton_distributed.runtime.client import Client
from triton_distributed.runtime.core import Core
from triton_distributed.serving.endpoint import ServedEndpoint


class OwnCalls:
    """Calls one endpoint of this runtime. It asks no discovery, and the runtime does not count it as a client.

    Args:
        runtime: the runtime.
        served: the endpoint.
    """

    def __init__(self, runtime: Core, served: ServedEndpoint) -> None:
        async def watch(apply: Callable[[Change], None]) -> _Fixed:
            apply(Snapshot((served.instance,)))
            return _Fixed()

        loop = runtime.event_loop()
        self._candidates = candidates = Candidates(served.name, loop, runtime.rng, watch, session=runtime.pool.get)
        services = Services(runtime, loop, candidates, runtime.pool, runtime.prober, "this worker", 0)
        self._client = Client(services, "round_robin", runtime.rng, False, Observers())

    async def call(self, request: Any, timeout_s: float) -> None:
        """Send a request and read the answer to its end. It is admitted before waiting requests.

        Raises:
            TritonError: as a call raises it.
        """
        options: Any = {"timeout": timeout_s, "priority": HIGHEST_PRIORITY, "metadata": {"canary": True}}
        await self._candidates.open()
        async for _ in self._client.generate(request, False, **options):
            pass

    def close(self) -> None:
        """Forget the endpoint."""
        self._candidates.close()


class _Fixed:
    """The watch of instances that do not change."""

    def close(self) -> None:
        pass
