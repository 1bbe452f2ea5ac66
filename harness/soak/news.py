"""Events of the soak. Each publisher numbers its events, and each subscriber checks that no event is missing."""

from __future__ import annotations

import asyncio
from typing import Any

from harness.requests import filling
from triton_distributed.events import Event, Subscription
from triton_distributed.runtime import DistributedRuntime

SUBJECT = "news"
PASSING = "passing"  # The publisher in a short-lived runtime. Its events are not numbered.
SIZE = 200  # Bytes of an event's filling.


async def tell(runtime: DistributedRuntime, by: str, n: int) -> None:
    """Publish event `n`."""
    component = runtime.namespace("soak").component("work")
    await component.publish(SUBJECT, {"by": by, "n": n, "text": filling(n, 0, SIZE)})


class News:
    """The events that one runtime publishes and receives.

    Attributes:
        published: the number of published events.
        heard: the number of the last event of each publisher.
        wrong: descriptions of events that should not have come.
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
        """Return what was published and received.

        Raises:
            Exception: the error that ended the subscription.
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
