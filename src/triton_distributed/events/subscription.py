"""A subscription as its user holds it: awaited until it is live, iterated, and ended by leaving."""

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
    """What is published on one subject, as it comes. Four ways to use it:

        async for event in component.subscribe("loaded"):       # leaving the loop ends the subscription
            …
        subscription = await component.subscribe("loaded")      # live: whatever is published from now on arrives
        async for event in subscription:
            …
        async with component.subscribe("loaded") as subscription:  # live within, ended after the block
            event = await subscription.get(timeout=1.0)

    It also ends with the last reference to it, and with its runtime; what has arrived by then can still be read where
    the runtime ended it.

    Attributes:
        unreadable: events that were left out because they are not what `publish` writes.
    """

    def __init__(
        self,
        inbox: Inbox,
        read: Callable[[bytes], T],
        opening: asyncio.Future[None] | None = None,
        closing: Callable[[Inbox], Any] | None = None,
    ) -> None:
        """Made by a plane.

        Args:
            opening: done when it is live, with the error that kept it from that; None where it is.
            closing: returns something to wait for when the inbox has closed, or None.
        """
        self._inbox = inbox
        self._read = read
        self._opening = opening
        self._closing = closing
        self._held = False  # by an `async with`, which ends it
        self.unreadable = 0

    @property
    def subject(self) -> str:
        """The subject, as it travels."""
        return self._inbox.subject

    @property
    def dropped(self) -> int:
        """Events that were lost because this subscriber, or its whole process, did not keep up."""
        return self._inbox.dropped

    @property
    def waiting(self) -> int:
        """Events that have arrived and were not read."""
        return self._inbox.waiting

    @property
    def closed(self) -> bool:
        """Whether nothing arrives any more."""
        return self._inbox.closed

    def __await__(self) -> Generator[Any, None, Subscription[T]]:
        """Wait until it is live.

        Raises:
            BrokerError, ConfigError, DiscoveryError: it cannot be.
        """
        return self._live().__await__()

    async def _live(self) -> Subscription[T]:
        opening = self._opening
        if opening is not None:
            try:
                await asyncio.shield(opening)
            except asyncio.CancelledError:
                if opening.cancelled():  # its plane was closed meanwhile; we were not cancelled
                    raise RuntimeClosed("subscribe") from None
                raise
            self._opening = None
        return self

    async def get(self, timeout: float | None = None) -> T:
        """The next event.

        Args:
            timeout: seconds to wait for it, or None.

        Raises:
            TimeoutError: none came in that time.
            SubscriptionClosed: it has ended, and what had arrived was read.
            BrokerError, ConfigError, DiscoveryError: it never became live.
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
                        "an event of %s is left out: %s (said once; subscription.unreadable counts)",
                        self.subject,
                        error,
                    )
                self.unreadable += 1

    def __aiter__(self) -> AsyncIterator[T]:
        return _Reading(self)

    def close(self) -> None:
        """End it now; what was not read is gone. Closing twice is harmless."""
        self._inbox.close()

    async def aclose(self) -> None:
        """End it, and wait until the event plane knows."""
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
        """An `async for` over it was left."""
        if not self._held:
            self._inbox.abandoned()

    def __del__(self) -> None:
        inbox = getattr(self, "_inbox", None)  # None where the constructor raised
        if inbox is not None:
            inbox.abandoned()

    def __repr__(self) -> str:
        return f"<Subscription {self.subject}{' closed' if self.closed else ''}, {self.dropped} dropped>"


class _Reading(AsyncIterator[T]):
    """The object of one `async for`. It is the loop's own, so that it goes when the loop is left, however that is."""

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
