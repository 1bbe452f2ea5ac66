"""Messages over the shared NATS connection without queues or tasks in between, for the request plane."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from triton_distributed.errors import BrokerError
from triton_distributed.external.nats import NatsConnection

if TYPE_CHECKING:
    import asyncio

    from nats.aio.client import Client as NatsClient
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

logger = logging.getLogger("triton_distributed.nats")

# Bytes that the client library may hold unsent before `publish` refuses more. From 2 MiB on, the library's `publish`
# waits for the socket, which is impossible outside a task.
MOST_PENDING = 1024 * 1024

NO_RESPONDERS = "503"
"""The server's status for a message with a reply subject but no subscriber."""


class NatsPort:
    """Publishes and receives messages within the call.

    Args:
        connection: the shared connection.
        client: its connected client, which keeps its subscriptions over reconnections.
    """

    def __init__(self, connection: NatsConnection, client: NatsClient) -> None:
        self._client = client
        self.where = connection.where

    @property
    def connected(self) -> bool:
        """Whether there is a connection at this moment."""
        return self._client.is_connected

    @property
    def closed(self) -> bool:
        """Whether the client has given up for good: its subscriptions are gone."""
        return self._client.is_closed

    @property
    def max_payload(self) -> int:
        """The server's largest message in bytes."""
        return self._client.max_payload

    def inbox(self) -> str:
        """Return a subject that no other client has."""
        return self._client.new_inbox()

    def publish(self, subject: str, data: bytes, reply: str) -> bool:
        """Pass a message to the client, which writes it before any task runs that becomes ready from now on.

        Returns:
            False if there is no connection, or too much waits; nothing was sent then.

        Raises:
            nats.errors.Error: the client refuses the message.
        """
        client = self._client
        if not client.is_connected or client.pending_data_size > MOST_PENDING:
            return False
        # `publish` is a coroutine only because it may wait for a full buffer, which was excluded above. So it ends in
        # its first step, which wakes the library's task that writes to the socket.
        step = client.publish(subject, data, reply)
        try:
            step.send(None)
        except StopIteration:
            return True
        step.close()
        raise BrokerError("NATS", self.where, "the client library waited unexpectedly")

    async def room(self) -> None:
        """Wait until `publish` accepts messages again.

        Raises:
            nats.errors.Error: the connection is lost, or nothing moved for 10 s.
        """
        while self._client.pending_data_size > MOST_PENDING:
            await self._client.flush()

    async def flush(self) -> None:
        """Wait until the server has received everything sent so far.

        Raises:
            nats.errors.Error: the connection is lost, or nothing moved for 10 s.
        """
        # The library writes its PING ahead of waiting messages. By the first answer these are sent too, and the second
        # answer comes after them.
        await self._client.flush()
        await self._client.flush()

    async def subscribe(self, subject: str, take: Callable[[Msg], None]) -> Subscription:
        """Call `take` with every message on `subject` as soon as it is read. Nothing waits, so there is no limit."""
        return await self._client.subscribe(subject, future=cast("asyncio.Future[Any]", _Receiver(take)))


class _Receiver:
    """Takes the place of a future in the client library, and receives every message of its subscription.

    With a callback, the library would put each message into a queue for the subscription's task. That takes another
    turn of the loop, and more CPU than the rest of a message's handling.
    """

    __slots__ = ("_take",)

    def __init__(self, take: Callable[[Msg], None]) -> None:
        self._take = take

    def cancelled(self) -> bool:
        return False

    def set_result(self, message: Msg) -> None:
        try:
            self._take(message)
        except Exception:  # it would silently end the library's only reader
            logger.exception("a message from NATS could not be processed")
