"""The interface of every event plane: bytes to all subscribers of a subject, at most once, in a publisher's order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from triton_distributed.events.inbox import MAX_BYTES, MAX_EVENTS, Inbox
from triton_distributed.events.subscription import Subscription


def unread(data: bytes) -> bytes:
    """Return the data unchanged."""
    return data


class EventPlane(Protocol):
    """Carries events. It belongs to one event loop, and connects when it is first used."""

    @property
    def where(self) -> str:
        """The plane's address, for error texts, e.g. `nats://localhost:4222`."""

    async def publish(self, subject: str, data: bytes) -> None:
        """Send `data` to every live subscription of exactly this subject, in this process and all others.

        It waits for no subscriber: a subscriber that does not read loses events, and a dead one is removed.

        Args:
            subject: plain text without spaces or wildcards, see `names.subject_token`.

        Raises:
            BrokerError: the carrier of events cannot be reached, and its buffer is full.
            MessageTooLarge: the carrier of events accepts no message of this size.
            ConfigError, DiscoveryError: the settings name no carrier that can be used.
        """

    def subscribe(
        self,
        subject: str,
        *,
        read: Callable[[bytes], Any] = unread,
        max_events: int = MAX_EVENTS,
        max_bytes: int = MAX_BYTES,
    ) -> Subscription[Any]:
        """Begin to subscribe at once. Awaiting the subscription returns when it is live.

        Args:
            subject: the exact subject.
            read: decodes an event for the subscriber; an event for which it raises DecodeError is skipped.
            max_events, max_bytes: the most unread events and bytes; beyond that the oldest are dropped and counted.

        Raises (from awaiting or reading it): as `publish`.
        """

    def inboxes(self) -> list[Inbox]:
        """The inboxes of this process's subscriptions."""

    async def close(self) -> None:
        """Send waiting events, within about a second, and end the subscriptions. Closing twice is harmless."""
