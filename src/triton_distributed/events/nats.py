"""Events over NATS. A runtime uses one connection for events and all other traffic over NATS."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from triton_distributed.errors import BrokerError, MessageTooLarge, RuntimeClosed
from triton_distributed.events.base import unread
from triton_distributed.events.inbox import MAX_BYTES, MAX_EVENTS, Inbox
from triton_distributed.events.subscribers import Subscribers
from triton_distributed.events.subscription import Subscription
from triton_distributed.external.nats import NatsConnection

if TYPE_CHECKING:
    from nats.aio.client import Client as NatsClient

LIVE_TIMEOUT_S = 5.0
"""Seconds for the server to confirm a subscription, or to accept published events."""

# Bytes that wait for a server that is away or does not read. The client library has the same bound.
BUFFER_BYTES = 2 * 1024 * 1024


class NatsEvents:
    """Carries events between all processes that use the same NATS servers.

    While the connection is lost, published events wait in a buffer of 2 MiB and are sent when it is back; if the buffer
    is full, `publish` raises BrokerError. Subscriptions come back with the connection, but miss the events that were
    published meanwhile.

    Args:
        connection: the runtime's connection; the runtime closes it.
    """

    def __init__(self, connection: NatsConnection) -> None:
        self._connection = connection
        self.where = connection.where
        self._own = Subscribers()
        self._subscribed: dict[Inbox, Any] = {}
        self._ending: dict[Inbox, asyncio.Task[None]] = {}
        self._opening: set[asyncio.Task[None]] = set()
        self._closed = False
        self._pid = os.getpid()

    async def publish(self, subject: str, data: bytes) -> None:
        if self._closed:
            raise RuntimeClosed("events")
        client = await self._connection.client()
        if len(data) > client.max_payload:
            raise MessageTooLarge("an event", len(data), client.max_payload, payload_limit(self.where))
        try:
            if client.pending_data_size + len(data) < BUFFER_BYTES:
                await client.publish(subject, data)  # It does not wait.
            else:
                await self._publish_when_there_is_room(client, subject, data)
        except Exception as error:  # nats-py raises errors of many types.
            raise self._error("cannot publish", error) from error

    async def _publish_when_there_is_room(self, client: NatsClient, subject: str, data: bytes) -> None:
        if client.pending_data_size > 2 * BUFFER_BYTES:
            raise BrokerError("NATS", self.where, f"it does not read: {client.pending_data_size:,} bytes are waiting")
        async with asyncio.timeout(LIVE_TIMEOUT_S):
            await client.publish(subject, data)

    def subscribe(
        self,
        subject: str,
        *,
        read: Callable[[bytes], Any] = unread,
        max_events: int = MAX_EVENTS,
        max_bytes: int = MAX_BYTES,
    ) -> Subscription[Any]:
        if self._closed:
            raise RuntimeClosed("events")
        inbox = Inbox(subject, max_events, max_bytes)
        inbox.on_close = self._forget
        self._own.add(inbox)
        opening = asyncio.get_running_loop().create_task(self._open(inbox))
        self._opening.add(opening)
        opening.add_done_callback(self._opened)
        return Subscription(inbox, read, opening, self._ending.get)

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._opening.discard(task)
        if not task.cancelled():
            task.exception()  # Retrieve it to avoid a warning: the program may never await the subscription.

    async def _open(self, inbox: Inbox) -> None:
        async def arrived(message: Any) -> None:
            inbox.push(message.data)

        try:
            client = await self._connection.client()
            # The library's own queue holds the messages of only one read of the socket, because `arrived` never waits.
            self._subscribed[inbox] = await client.subscribe(
                inbox.subject, cb=arrived, pending_msgs_limit=MAX_EVENTS, pending_bytes_limit=MAX_BYTES
            )
            await self._connection.settle(LIVE_TIMEOUT_S)
        except Exception as error:  # nats-py raises errors of many types.
            inbox.close()
            raise self._error(f"cannot subscribe to {inbox.subject}", error) from error
        finally:
            if inbox.closed:
                self._forget(inbox)

    def _error(self, action: str, error: Exception) -> Exception:
        if isinstance(error, BrokerError):
            return error
        return BrokerError("NATS", self.where, f"{action}: {words(error)}")

    def _forget(self, inbox: Inbox) -> None:
        self._own.remove(inbox)
        subscribed = self._subscribed.pop(inbox, None)
        if subscribed is None or os.getpid() != self._pid or inbox.loop.is_closed():
            return
        ending = self._ending[inbox] = inbox.loop.create_task(_unsubscribe(subscribed))
        ending.add_done_callback(lambda _: self._ending.pop(inbox, None))

    def inboxes(self) -> list[Inbox]:
        return self._own.inboxes()

    async def close(self) -> None:
        self._closed = True
        opening = list(self._opening)
        for task in opening:
            task.cancel()
        if opening:
            await asyncio.wait(opening)
        self._own.close()
        if self._ending:
            await asyncio.wait(self._ending.values())


async def _unsubscribe(subscribed: Any) -> None:
    try:
        await subscribed.unsubscribe()
    except Exception:  # The connection is closed, and the subscription has ended with it.
        return


def payload_limit(where: str) -> str:
    """The name of NATS' limit in the error of a message that is too large."""
    return f"max_payload of the NATS server at {where}"


def words(error: Exception) -> str:
    """The meaning of an error of the client library, without the error's name if that adds nothing."""
    kind = type(error).__name__
    if kind == "OutboundBufferLimitError":
        return f"not connected, and the buffer of {BUFFER_BYTES:,} bytes is full"
    if isinstance(error, TimeoutError) or kind == "TimeoutError":
        return "no answer"
    return str(error).removeprefix("nats: ") or kind
