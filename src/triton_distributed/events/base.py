"""What every event plane does: bytes to all subscribers of a subject, at most once, in a publisher's order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from triton_distributed.events.inbox import MAX_BYTES, MAX_EVENTS, Inbox
from triton_distributed.events.subscription import Subscription


def unread(data: bytes) -> bytes:
    """Hand out what came as it came."""
    return data


class EventPlane(Protocol):
    """Carries events. Belongs to one event loop; nothing is connected before it is used."""

    @property
    def where(self) -> str:
        """The place, for error texts: `nats://localhost:4222`."""

    async def publish(self, subject: str, data: bytes) -> None:
        """Send `data` to every live subscription of exactly this subject, of this process and of all others.

        It waits for no subscriber: one that does not read loses events, one that is dead is forgotten.

        Args:
            subject: plain text without spaces or wildcards, see `names.subject_token`.

        Raises:
            BrokerError: what carries events cannot be reached, and its buffer is full.
            MessageTooLarge: what carries events takes no message of this size.
            ConfigError, DiscoveryError: the settings name nothing that could carry them.
        """

    def subscribe(
        self,
        subject: str,
        *,
        read: Callable[[bytes], Any] = unread,
        max_events: int = MAX_EVENTS,
        max_bytes: int = MAX_BYTES,
    ) -> Subscription[Any]:
        """Begin to subscribe at once; the subscription is live when it was awaited.

        Args:
            subject: exactly this one.
            read: turns the bytes of an event into what the subscriber gets; what raises DecodeError is left out.
            max_events, max_bytes: what may wait unread; beyond that the oldest are dropped and counted.

        Raises (from awaiting or reading it): as `publish`.
        """

    def inboxes(self) -> list[Inbox]:
        """The inboxes of this process's subscriptions."""

    async def close(self) -> None:
        """Send what waits, within a second or so, and end the subscriptions. Closing twice is harmless."""
