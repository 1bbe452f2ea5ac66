"""Clients that note, call by call, whether an instance is still among those that they may call."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from benchmarks.survival.content import KINDS, WORK
from triton_distributed.names import Instance
from triton_distributed.runtime import Client, DistributedRuntime

EVERY_S = 0.002  # between two calls: how exactly the moment is known


class Noting:
    """A policy: the instances in turn. What it is offered is what any policy of a user is offered.

    Attributes:
        offered_at: when the instance that is watched was last among the candidates of a call.
        without_at: when it first was not, after that.
        sent_at: when a call was last sent to it.
    """

    def __init__(self) -> None:
        self._turn = 0
        self._watched = 0
        self.offered_at = self.without_at = self.sent_at = 0.0

    def watch(self, instance_id: int) -> None:
        """Begin to look for an instance."""
        self._watched = instance_id
        self.offered_at = self.without_at = self.sent_at = 0.0

    def __call__(self, request: Any, instances: tuple[Instance, ...], load: Any) -> Instance:
        self._turn += 1
        chosen = instances[self._turn % len(instances)]
        now = time.monotonic()
        if any(each.id == self._watched for each in instances):
            self.offered_at, self.without_at = now, 0.0
        elif not self.without_at:
            self.without_at = now
        if chosen.id == self._watched:
            self.sent_at = now
        return chosen


class Watching:
    """One such client, in a runtime of its own."""

    def __init__(self, name: str, runtime: DistributedRuntime, client: Client, policy: Noting) -> None:
        self._name, self._runtime, self._client, self._policy = name, runtime, client, policy
        self._number = 0
        self._failed: list[str] = []
        self._running: set[asyncio.Task[None]] = set()
        self._pacing: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, name: str) -> Watching:
        policy = Noting()
        runtime = DistributedRuntime()
        return cls(name, runtime, await runtime.endpoint(WORK).client(policy=policy), policy)

    async def begin(self, instance_id: int, workers: int) -> None:
        """Connect to every instance that answers, and begin to call."""
        while len(self._client.view.candidates) != workers:
            await asyncio.sleep(EVERY_S)
        for each in self._client.view.candidates:
            async for _ in self._client.direct(self._request(), each.id):
                pass
        self._policy.watch(instance_id)
        self._pacing = asyncio.ensure_future(self._pace())

    def _request(self) -> dict[str, Any]:
        self._number += 1
        return {**KINDS["idempotent"].request(f"{self._name}-idempotent-{self._number}"), "pause_s": 0, "tail_s": 0}

    async def _pace(self) -> None:
        while True:
            task = asyncio.ensure_future(self._one())
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            await asyncio.sleep(EVERY_S)

    async def _one(self) -> None:
        try:
            await self._client.call(self._request(), idempotent=True)
        except Exception as error:
            self._failed.append(f"{type(error).__name__}: {error}")

    async def end(self) -> dict[str, Any]:
        """Stop calling; what was noted."""
        assert self._pacing is not None
        self._pacing.cancel()
        await asyncio.wait([self._pacing, *self._running])
        failed, self._failed = self._failed, []
        policy = self._policy
        return {
            "offered_at": policy.offered_at,
            "without_at": policy.without_at,
            "sent_at": policy.sent_at,
            "failed": failed[:5],
        }
