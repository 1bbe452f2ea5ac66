"""A subscription for its user: await it until it is live, iterate over it, and leave the loop to end it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any, Generic, TypeVar

from triton_distributed.errors import DecodeError, RuntimeClosed, SubscriptionClosed
from triton_distributed.events.inbox import Inbox

logger = logging.getLogger("triton_distributed.events")

T = TypeVar("T")


class Subscription(Generic[T]):
    """The events of one subject, in the order of arrival. Ways to use it:

        async for event in component.subscribe("loaded"):       # leaving the loop ends the subscription
            …
        subscription = await component.subscribe("loaded")      # live: every event published from now on arrives
        async for event in subscription:
            …
        async with component.subscribe("loaded") as subscription:  # live in the block, ended after it
            event = await subscription.get(timeout=1.0)

    A subscription also ends with the last reference to it, and with its runtime. If the runtime ended it, events that
    have arrived can still be read.

    Attributes:
        unreadable: events that were skipped because `publish` did not write them.
    """

    def __init__(
        self,
        inbox: Inbox,
        read: Callable[[bytes], T],
        opening: asyncio.Future[None] | None = None,
        closing: Callable[[Inbox], Any] | None = None,
    ) -> None:
        """Made by an event plane.

        Args:
            opening: done when the subscription is live or has failed; None if it is live already.
            closing: returns a future to wait for after the inbox has closed, or None.
        """
        self._inbox = inbox
        self._read = read
        self._opening = opening
        self._closing = closing
        self._held = False  # An `async with` block holds the subscription, and will end it.
        self.unreadable = 0

    @property
    def subject(self) -> str:
        """The subject of the events."""
        return self._inbox.subject

    @property
    def dropped(self) -> int:
        """The number of events lost because this subscriber, or its whole process, did not keep up."""
        return self._inbox.dropped

    @property
    def waiting(self) -> int:
        """The number of events that have arrived and were not read yet."""
        return self._inbox.waiting

    @property
    def closed(self) -> bool:
        """Whether the subscription has ended, so that no further event arrives."""
        return self._inbox.closed

    def __await__(self) -> Generator[Any, None, Subscription[T]]:
        """Wait until the subscription is live.

        Raises:
            BrokerError, ConfigError, DiscoveryError: it cannot become live.
        """
        return self._live().__await__()

    async def _live(self) -> Subscription[T]:
        opening = self._opening
        if opening is not None:
            try:
                await asyncio.shield(opening)
            except asyncio.CancelledError:
                if opening.cancelled():  # The plane was closed meanwhile; the present task was not cancelled.
                    raise RuntimeClosed("subscribe") from None
                raise
            self._opening = None
        return self

    async def get(self, timeout: float | None = None) -> T:
        """The next event.

        Args:
            timeout: seconds to wait for it; None for no limit.

        Raises:
            TimeoutError: no event came in that time.
            SubscriptionClosed: the subscription has ended, and all events that had arrived were read.
            BrokerError, ConfigError, DiscoveryError: the subscription never became live.
        """
        if timeout is not None:
            try:
                async with asyncio.timeout(timeout):
                    return await self.get()
            except TimeoutError:
                raise TimeoutError(f"no event of {self.subject} within {timeout:g} s") from None
        if self._opening is not None:
            await self._live()
        while True:
            data = await self._inbox.get()
            try:
                return self._read(data)
            except DecodeError as error:
                if not self.unreadable:
                    logger.warning(
                        "an event of %s is skipped: %s (logged once; subscription.unreadable counts them)",
                        self.subject,
                        error,
                    )
                self.unreadable += 1

    def __aiter__(self) -> AsyncIterator[T]:
        return _Reading(self)

    def close(self) -> None:
        """End the subscription now and discard its unread events. Closing twice is harmless."""
        self._inbox.close()

    async def aclose(self) -> None:
        """End the subscription, and wait until the event plane has unsubscribed."""
        self._inbox.close()
        if self._closing is not None and (ending := self._closing(self._inbox)) is not None:
            await asyncio.shield(ending)

    async def __aenter__(self) -> Subscription[T]:
        self._held = True
        try:
            return await self._live()
        except BaseException:
            self.close()
            raise

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def left(self) -> None:
        """Close the inbox after an `async for` was left, unless an `async with` block holds the subscription."""
        if not self._held:
            self._inbox.abandoned()

    def __del__(self) -> None:
        inbox = getattr(self, "_inbox", None)  # None if the constructor raised.
        if inbox is not None:
            inbox.abandoned()

    def __repr__(self) -> str:
        return f"<Subscription {self.subject}{' closed' if self.closed else ''}, {self.dropped} dropped>"


class _Reading(AsyncIterator[T]):
    """The iterator of one `async for`. Only the loop refers to it, so leaving the loop in any way finalises it."""

    __slots__ = ("_subscription",)

    def __init__(self, subscription: Subscription[T]) -> None:
        self._subscription = subscription

    async def __anext__(self) -> T:
        try:
            return await self._subscription.get()
        except SubscriptionClosed:
            raise StopAsyncIteration from None

    def __del__(self) -> None:
        self._subscription.left()
