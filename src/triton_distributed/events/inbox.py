"""The unread events of one subscription. The inbox is bounded: the oldest events are dropped for the newest."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from triton_distributed.errors import SubscriptionClosed

logger = logging.getLogger("triton_distributed.events")

MAX_EVENTS = 65_536
"""Most unread events by default: a few seconds of the fastest publisher, for a subscriber that is busy."""

MAX_BYTES = 64 * 1024 * 1024
"""Most unread bytes by default, as TRD_SESSION_WINDOW_BYTES: the memory that one peer may use while nothing is read."""

TURN = 64
"""Events read without waiting before other callbacks of the loop run."""


class Inbox:
    """The queue between the event plane, which pushes, and the subscription, which reads.

    Args:
        subject: the subject of the events.
        max_events: the most unread events, at least 1.
        max_bytes: the most unread bytes, at least 1; a single event may be larger.

    Attributes:
        dropped: events that were dropped here, or that their publisher could not send.
        on_close: called once when the inbox closes.
        closed: no further event is accepted.
    """

    def __init__(self, subject: str, max_events: int = MAX_EVENTS, max_bytes: int = MAX_BYTES) -> None:
        if max_events < 1 or max_bytes < 1:
            raise ValueError(f"max_events={max_events}, max_bytes={max_bytes}: both must be at least 1")
        self.subject = subject
        self.dropped = 0
        self.closed = False
        self.on_close: Callable[[Inbox], None] | None = None
        self.loop = asyncio.get_running_loop()
        self._max_events, self._max_bytes = max_events, max_bytes
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._taken = 0  # Events read in a row without a turn of the loop.
        self._arrived = asyncio.Event()

    @property
    def waiting(self) -> int:
        """The number of events that were not read yet."""
        return len(self._waiting)

    @property
    def waiting_bytes(self) -> int:
        """The number of bytes of those events."""
        return self._bytes

    def push(self, data: bytes, lost: int = 0) -> None:
        """Add one event, and count the `lost` events that were dropped before it."""
        if self.closed:
            return
        if lost:
            self._drop(lost)
        waiting = self._waiting
        waiting.append(data)
        self._bytes += len(data)
        if self._bytes > self._max_bytes or len(waiting) > self._max_events:
            while len(waiting) > 1 and (self._bytes > self._max_bytes or len(waiting) > self._max_events):
                self._bytes -= len(waiting.popleft())
                self._drop(1)
        self._arrived.set()

    def _drop(self, count: int) -> None:
        if not self.dropped:
            logger.warning(
                "events of %s are dropped because this subscriber does not keep up: it may have %d events or %d bytes "
                "unread, beyond that the oldest are dropped (logged once; subscription.dropped counts them)",
                self.subject,
                self._max_events,
                self._max_bytes,
            )
        self.dropped += count

    async def get(self) -> bytes:
        """Return the oldest unread event, or wait for the next one.

        Raises:
            SubscriptionClosed: the inbox is closed, and all events were read.
        """
        waiting = self._waiting
        self._taken += 1
        if self._taken >= TURN:
            self._taken = 0
            await asyncio.sleep(0)
        while not waiting:
            if self.closed:
                raise SubscriptionClosed(self.subject)
            self._taken = 0
            self._arrived.clear()
            await self._arrived.wait()
        data = waiting.popleft()
        self._bytes -= len(data)
        return data

    def close(self, keep: bool = False) -> None:
        """Accept no further event.

        Args:
            keep: keep the events that have arrived, so that they can still be read.
        """
        if not keep:
            self._waiting.clear()
            self._bytes = 0
        if not self.closed:
            self.closed = True
            self._arrived.set()
            if self.on_close is not None:
                self.on_close(self)

    def abandoned(self) -> None:
        """Close the inbox because its reader is gone. Finalisers call this in any thread."""
        if self.closed:
            return
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self.loop:
            self.close()
        elif not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.close)
