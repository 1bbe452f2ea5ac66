"""Messages over the shared NATS connection with no queue and no task in between: what the request plane needs."""

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

# Bytes that the client library may hold unsent before `publish` refuses more. From 2 MiB on its own `publish` waits for
# the socket, which cannot be done outside of a task.
MOST_PENDING = 1024 * 1024

NO_RESPONDERS = "503"
"""The server's status for a message that has a reply subject and no subscriber."""


class NatsPort:
    """Publishes and receives within the call.

    Args:
        connection: whose client this is.
        client: a connected client; it keeps its subscriptions over reconnections.
    """

    def __init__(self, connection: NatsConnection, client: NatsClient) -> None:
        self._client = client
        self.where = connection.where

    @property
    def connected(self) -> bool:
        """Whether there is a connection this moment."""
        return self._client.is_connected

    @property
    def closed(self) -> bool:
        """Whether the client has given up for good: its subscriptions are gone."""
        return self._client.is_closed

    @property
    def max_payload(self) -> int:
        """Bytes that the server takes in one message."""
        return self._client.max_payload

    def inbox(self) -> str:
        """A subject that no other client has."""
        return self._client.new_inbox()

    def publish(self, subject: str, data: bytes, reply: str) -> bool:
        """Hand a message to the client, which writes it before any task that becomes ready from now on runs.

        Returns:
            False where it is taken only later: there is no connection, or too much waits; nothing was sent then.

        Raises:
            nats.errors.Error: the client refuses it.
        """
        client = self._client
        if not client.is_connected or client.pending_data_size > MOST_PENDING:
            return False
        # `publish` is a coroutine for the sake of one case, a full buffer, which was excluded: it ends in its first
        # step. That step wakes the library's task that writes to the socket.
        step = client.publish(subject, data, reply)
        try:
            step.send(None)
        except StopIteration:
            return True
        step.close()
        raise BrokerError("NATS", self.where, "the client library waited where it never did")

    async def room(self) -> None:
        """Wait until `publish` takes messages again.

        Raises:
            nats.errors.Error: the connection is lost, or nothing moved for 10 s.
        """
        while self._client.pending_data_size > MOST_PENDING:
            await self._client.flush()

    async def flush(self) -> None:
        """Wait until the server has seen everything so far.

        Raises:
            nats.errors.Error: the connection is lost, or nothing moved for 10 s.
        """
        # The library writes its PING ahead of what waits to be sent; by the time of the first answer that is sent too,
        # and the second answer comes after it.
        await self._client.flush()
        await self._client.flush()

    async def subscribe(self, subject: str, take: Callable[[Msg], None]) -> Subscription:
        """Call `take` with every message on `subject`, as soon as it is read. No limit applies, for nothing waits."""
        return await self._client.subscribe(subject, future=cast("asyncio.Future[Any]", _Receiver(take)))


class _Receiver:
    """Stands where the client library expects a future, and is given every message of its subscription.

    With a callback the library would put each into a queue, to be taken out by a task, one a subscription: a turn of
    the loop later, and for more CPU than all the rest of a message costs.
    """

    __slots__ = ("_take",)

    def __init__(self, take: Callable[[Msg], None]) -> None:
        self._take = take

    def cancelled(self) -> bool:
        return False

    def set_result(self, message: Msg) -> None:
        try:
            self._take(message)
        except Exception:  # it would end the library's only reader, silently
            logger.exception("a message from NATS was not understood")
