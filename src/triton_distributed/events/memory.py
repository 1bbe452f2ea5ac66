"""Events between the runtimes of one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from triton_distributed.errors import RuntimeClosed
from triton_distributed.events.base import unread
from triton_distributed.events.inbox import MAX_BYTES, MAX_EVENTS, Inbox
from triton_distributed.events.subscribers import Subscribers
from triton_distributed.events.subscription import Subscription

# One hub for each loop: all planes on the loop share it, and it ends with the loop.
_hubs: WeakKeyDictionary[asyncio.AbstractEventLoop, Subscribers] = WeakKeyDictionary()


class MemoryEvents:
    """Carries events between all planes of this kind on the running loop."""

    where = "memory://default"

    def __init__(self) -> None:
        self._own = Subscribers()
        self._closed = False

    def _hub(self) -> Subscribers:
        if self._closed:
            raise RuntimeClosed("events")
        return _hubs.setdefault(asyncio.get_running_loop(), Subscribers())

    async def publish(self, subject: str, data: bytes) -> None:
        self._hub().deliver(subject, data)

    def subscribe(
        self,
        subject: str,
        *,
        read: Callable[[bytes], Any] = unread,
        max_events: int = MAX_EVENTS,
        max_bytes: int = MAX_BYTES,
    ) -> Subscription[Any]:
        hub = self._hub()
        inbox = Inbox(subject, max_events, max_bytes)

        def forget(closed: Inbox) -> None:
            hub.remove(closed)
            self._own.remove(closed)

        inbox.on_close = forget
        hub.add(inbox)
        self._own.add(inbox)
        return Subscription(inbox, read)

    def inboxes(self) -> list[Inbox]:
        return self._own.inboxes()

    async def close(self) -> None:
        self._closed = True
        self._own.close()
