"""The JetStream side of a work queue: its stream and consumer at the NATS server, and repeated requests."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from triton_distributed.errors import BrokerError
from triton_distributed.events.nats import words
from triton_distributed.external.nats import NatsConnection

if TYPE_CHECKING:
    from nats.aio.client import Client as NatsClient
    from nats.js import JetStreamContext

MAX_MESSAGES = 1_000_000
"""Most messages stored in one queue at a time. When they are reached, `put` raises."""

MAX_UNACKNOWLEDGED = 10_000
"""Most unacknowledged messages of one queue at a time, over the consumers of all processes."""

TIMEOUT_S = 10.0
"""Seconds for the server to store a message or confirm an acknowledgement, long enough for a restart of the server."""

ATTEMPT_S = 2.0
"""Seconds until a request is sent again. The server knows a message by its id and stores it once."""

SILENCES = 2
"""Unanswered attempts before an acknowledgement fails. A server that lost a delivery never answers, but repeats it."""

PAUSE_S = 0.1
"""Seconds between attempts while the server is down or not ready yet."""

NAME_IN_USE = 10058
"""JetStream's error code for a stream that exists with another configuration. It is used as the operator made it."""


class QueueNames(msgspec.Struct, frozen=True):
    """The names of a queue.

    Attributes:
        title: its name in error texts.
        stream: the JetStream stream: no dots, spaces, wildcards or slashes, at most 255 bytes.
        subject: the subject of its messages.
        consumer: the one durable consumer that all processes share.
    """

    title: str
    stream: str
    subject: str
    consumer: str = "workers"


class JetStream:
    """One queue at the server.

    Args:
        connection: the runtime's connection to NATS.
        names: the names of the queue.
        ack_wait_s: see `WorkQueue`.

    Attributes:
        used: the server has shown that it can keep this queue, so a failed request is worth another attempt.
    """

    def __init__(self, connection: NatsConnection, names: QueueNames, ack_wait_s: float) -> None:
        self.connection = connection
        self.names = names
        self.ack_wait_s = ack_wait_s
        self.used = False
        self._have_stream = False
        self._have_consumer = False

    async def ask(
        self, subject: str, data: bytes, end: float, failed: str, headers: dict[str, str] | None = None
    ) -> Any:
        """Send a request until the server answers, even if the server restarts meanwhile.

        Args:
            end: the deadline, on the loop's clock.
            failed: the text of the error if the request fails.
            headers: the headers of a message to store; None for an acknowledgement.

        Raises:
            BrokerError: the server did not answer in time, or cannot keep the queue.
        """
        loop = asyncio.get_running_loop()
        reason = "no answer"
        silences = 0
        while (left := end - loop.time()) > 0:
            try:
                if headers is not None:
                    await self.stream()
                if self.connection.connected:
                    client = await self.connection.client()
                    return await client.request(subject, data, timeout=min(left, ATTEMPT_S), headers=headers)
                reason = "not connected"
            except Exception as error:  # The server may be starting, stopping or slow.
                if isinstance(error, BrokerError) and (not self.used or self.connection.closed):
                    raise
                reason = words(error)
                self.forget()
                silences += isinstance(error, TimeoutError)
                if headers is None and silences >= SILENCES:
                    break
            await asyncio.sleep(PAUSE_S)
        raise self.error(f"{failed}: {reason}")

    async def confirm(self, reply: str, data: bytes) -> None:
        """Send the server an acknowledgement of a message, and wait for the confirmation.

        Raises:
            BrokerError: the server did not confirm in time.
        """
        end = asyncio.get_running_loop().time() + TIMEOUT_S
        await self.ask(reply, data, end, "cannot acknowledge")

    async def consumer(self) -> NatsClient:
        """Make sure that the stream and the consumer exist, and return the NATS client."""
        jetstream = await self.stream()
        if not self._have_consumer:
            from nats.js.api import AckPolicy, ConsumerConfig

            try:
                await jetstream.add_consumer(
                    self.names.stream,
                    ConsumerConfig(
                        durable_name=self.names.consumer,
                        ack_policy=AckPolicy.EXPLICIT,
                        ack_wait=self.ack_wait_s,
                        max_ack_pending=MAX_UNACKNOWLEDGED,
                    ),
                )
            except Exception as error:  # nats-py raises errors of many types.
                self.forget()
                raise self.error(f"cannot make the consumer: {words(error)}") from error
            self._have_consumer = True
        return await self.connection.client()

    async def stream(self) -> JetStreamContext:
        """Make sure that the stream exists, and return the JetStream context."""
        client = await self.connection.client()
        jetstream = client.jetstream(timeout=ATTEMPT_S)
        if not self._have_stream:
            from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig
            from nats.js.errors import APIError, ServiceUnavailableError

            try:
                await jetstream.add_stream(
                    StreamConfig(
                        name=self.names.stream,
                        description=self.names.title,
                        subjects=[self.names.subject],
                        retention=RetentionPolicy.WORK_QUEUE,
                        storage=StorageType.FILE,
                        max_msgs=MAX_MESSAGES,
                        discard=DiscardPolicy.NEW,
                    )
                )
            except ServiceUnavailableError as error:
                raise self.error("has no JetStream: start it with `nats-server -js`") from error
            except APIError as error:
                if error.err_code != NAME_IN_USE:
                    raise self.error(f"cannot make the stream: {words(error)}") from error
            except Exception as error:  # nats-py raises errors of many types.
                raise self.error(f"cannot make the stream: {words(error)}") from error
            self._have_stream = self.used = True
        return jetstream

    def forget(self) -> None:
        """Check again at the next use whether stream and consumer exist: a server may come back empty."""
        self._have_stream = self._have_consumer = False

    def error(self, reason: str) -> BrokerError:
        """An error about this queue."""
        return BrokerError("NATS", self.connection.where, f"{self.names.title}: {reason}")
