"""Events and work queues of one runtime, as components and namespaces offer them."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

from triton_distributed.errors import ConfigError, MessageTooLarge
from triton_distributed.events import Event, EventPlane, PulledMessages, Subscription, WorkQueue
from triton_distributed.events.event import pack, unpack
from triton_distributed.events.inbox import TURN, Inbox
from triton_distributed.events.jetstream import QueueNames
from triton_distributed.external.nats import NatsConnection
from triton_distributed.names import check_name, service_name, stream_name, subject_token


# Cached because making a subject costs 5 µs, half of a publish. A program has few names.
@functools.lru_cache(maxsize=4096)
def component_subject(namespace: str, component: str, name: str) -> str:
    """The subject of a component's event: `{service_name}.events.{name}`, made safe by `names.subject_token`.

    Raises:
        InvalidName: `name` is not a valid event name.
    """
    return f"{service_name(namespace, component)}.events.{subject_token(check_name('event', name))}"


@functools.lru_cache(maxsize=4096)
def namespace_subject(namespace: str, name: str) -> str:
    """The subject of a namespace's event: `namespace.{namespace}.{name}`, both made safe by `names.subject_token`.

    Raises:
        InvalidName: `name` is not a valid event name.
    """
    return f"namespace.{subject_token(namespace)}.{subject_token(check_name('event', name))}"


class RuntimeEvents:
    """Publishes and subscribes for one runtime, over the event plane that the settings choose.

    Args:
        make: returns the event plane; called at the first publication or subscription.
        nats: the connection for work queues; None if no setting asks for NATS.
        publisher: the runtime's instance id.
        max_message_bytes: the largest event or queued message, in bytes.
    """

    def __init__(
        self, make: Callable[[], EventPlane], nats: NatsConnection | None, publisher: int, max_message_bytes: int
    ) -> None:
        self._make = make
        self._nats = nats
        self._publisher = publisher
        self._max_message_bytes = max_message_bytes
        self._plane: EventPlane | None = None
        self._pulls: set[PulledMessages] = set()  # One for each open `async with queue.pull()` of the program.
        self._in_a_row = 0

    def plane(self) -> EventPlane:
        """The event plane, made at the first use.

        Raises:
            ConfigError: the settings name no event plane that can be used.
        """
        if self._plane is None:
            self._plane = self._make()
        return self._plane

    def publish(self, subject: str, payload: object) -> Coroutine[Any, Any, None]:
        """See `Component.publish`."""
        data = pack(payload, self._publisher)
        if len(data) > self._max_message_bytes:
            raise MessageTooLarge("an event", len(data), self._max_message_bytes)
        return self._publish(subject, data)

    async def _publish(self, subject: str, data: bytes) -> None:
        await self.plane().publish(subject, data)
        self._in_a_row += 1
        if self._in_a_row >= TURN:  # A loop that only publishes must let its own subscribers and sockets run.
            self._in_a_row = 0
            await asyncio.sleep(0)

    def subscribe(self, name: str, subject: str, max_events: int, max_bytes: int) -> Subscription[Event]:
        """See `Component.subscribe`."""

        def read(data: bytes) -> Event:
            payload, publisher = unpack(data)
            return Event(name, payload, publisher, subject)

        return self.plane().subscribe(subject, read=read, max_events=max_events, max_bytes=max_bytes)

    def queue(
        self, namespace: str, component: str, name: str, ack_wait_s: float, max_deliveries: int | None
    ) -> WorkQueue:
        """See `Component.queue`."""
        check_name("queue", name)
        if self._nats is None:
            raise ConfigError(
                "NATS_SERVER", "", "NATS keeps the work queues: set it to a server that runs with JetStream (-js)"
            )
        names = QueueNames(
            f'queue "{name}" of {namespace}/{component}',
            stream_name(namespace, component, name),
            f"{service_name(namespace, component)}.queue.{subject_token(name)}",
        )
        return WorkQueue(
            self._nats,
            names,
            self._publisher,
            self._max_message_bytes,
            self._pulls,
            ack_wait_s=ack_wait_s,
            max_deliveries=max_deliveries,
        )

    @property
    def inboxes(self) -> list[Inbox]:
        """The inboxes of all subscriptions."""
        return [] if self._plane is None else self._plane.inboxes()

    @property
    def pulls(self) -> list[PulledMessages]:
        """The open consumers of work queues."""
        return list(self._pulls)

    async def close(self) -> None:
        """Send pending events, then end the subscriptions and the queue consumers."""
        for pull in list(self._pulls):
            pull.end()
        if self._plane is not None:
            await self._plane.close()
