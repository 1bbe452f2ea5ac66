"""Events of the soak: each publisher numbers its own, and each subscriber checks that none is missing."""

from __future__ import annotations

import asyncio
from typing import Any

from harness.requests import filling
from triton_distributed.events import Event, Subscription
from triton_distributed.runtime import DistributedRuntime

SUBJECT = "news"
PASSING = "passing"  # the publisher in a runtime that does not stay; its events are not numbered
SIZE = 200  # bytes of an event's filling


async def tell(runtime: DistributedRuntime, by: str, n: int) -> None:
    """Publish event `n`."""
    component = runtime.namespace("soak").component("work")
    await component.publish(SUBJECT, {"by": by, "n": n, "text": filling(n, 0, SIZE)})


class News:
    """What one runtime publishes and hears.

    Attributes:
        published: how many events.
        heard: the number of the last event of each publisher.
        wrong: events that should not have come, in words.
    """

    def __init__(self, runtime: DistributedRuntime, name: str) -> None:
        self._runtime, self._name = runtime, name
        self._publishing = asyncio.Lock()
        self._subscription: Subscription[Event] | None = None
        self._task: asyncio.Task[None] | None = None
        self.published = 0
        self.heard: dict[str, int] = {}
        self.wrong: list[str] = []

    async def open(self) -> None:
        """Subscribe: events from now on are checked."""
        component = self._runtime.namespace("soak").component("work")
        self._subscription = await component.subscribe(SUBJECT)
        self._task = asyncio.create_task(self._listen(self._subscription))

    async def publish(self) -> None:
        """Publish the next event."""
        async with self._publishing:
            self.published += 1
            await tell(self._runtime, self._name, self.published)

    async def _listen(self, subscription: Subscription[Event]) -> None:
        async for event in subscription:
            self.take(event.data)

    def take(self, payload: Any) -> None:
        """Check one event."""
        by, n, text = payload["by"], payload["n"], payload["text"]
        if text != filling(n, 0, SIZE):
            self.wrong.append(f"event {n} of {by} says {text!r}")
        if by == PASSING:
            return
        if self.heard.get(by, n - 1) != n - 1:
            self.wrong.append(f"event {n} of {by} came after event {self.heard[by]}")
        self.heard[by] = n

    def tally(self) -> dict[str, Any]:
        """What was published and heard.

        Raises:
            Exception: what ended the listening.
        """
        if self._task is not None and self._task.done():
            self._task.result()
        dropped = self._subscription.dropped if self._subscription is not None else 0
        return {"published": self.published, "heard": self.heard, "dropped": dropped, "wrong": self.wrong[:20]}

    async def close(self) -> None:
        """Stop listening."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
