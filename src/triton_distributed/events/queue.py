"""Work queues: what is put is kept by NATS JetStream until some consumer has said that it is done."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from triton_distributed.errors import BrokerError, MessageTooLarge
from triton_distributed.events.event import pack
from triton_distributed.events.nats import payload_limit, words
from triton_distributed.events.pulling import PulledMessages, QueuedMessage
from triton_distributed.external.nats import NatsConnection

if TYPE_CHECKING:
    from nats.aio.client import Client as NatsClient
    from nats.js import JetStreamContext

MAX_MESSAGES = 1_000_000  # stored at once; the next `put` raises
MAX_UNACKNOWLEDGED = 10_000  # given out at once, to all consumers together
TIMEOUT_S = 10.0  # for the server to store or confirm something, a restart of it included
ATTEMPT_S = 2.0  # until the same is sent again; the server knows a message by its id and keeps it once
SILENCES = 2  # a server that has lost what it knew of a delivery never answers: it delivers again
PAUSE_S = 0.1  # between attempts, while a server is down or not ready yet
NAME_IN_USE = 10058  # JetStream: the stream is there with another configuration, which is its operator's business


@dataclass(frozen=True, slots=True)
class QueueNames:
    """What a queue is called.

    Attributes:
        title: for people.
        stream: the JetStream stream: no dots, spaces, wildcards or slashes, at most 255 bytes.
        subject: what its messages are published under.
        consumer: the one durable consumer that all processes share.
    """

    title: str
    stream: str
    subject: str
    consumer: str = "workers"


class WorkQueue:
    """Messages that each go to one consumer, again if it does not finish. Made by `component.queue(name)`.

    Any number of processes put and any number take. What is stored survives its producer, its consumers and a restart
    of the server. A message is delivered at least once: when its consumer died after the work and before `ack`, twice.

    Args:
        connection: the runtime's.
        names: what it is called.
        publisher: the instance id of the runtime.
        max_message_bytes: of a payload; the server's own limit is usually lower.
        pulls: where its consumers are kept while they are at work, for whoever ends them.
        ack_wait_s: seconds after which a message that is neither acknowledged nor in progress goes to the next
            consumer. It belongs to the queue: where processes differ, whoever began to consume last decides.
        max_deliveries: a message that was delivered so often and is not acknowledged is dropped, with an error in the
            log of the process that would have got it next; None for no end.

    Attributes:
        used: the server has shown that it can keep this queue, so that a failure from now on is worth another try.
    """

    def __init__(
        self,
        connection: NatsConnection,
        names: QueueNames,
        publisher: int,
        max_message_bytes: int,
        pulls: set[PulledMessages],
        *,
        ack_wait_s: float = 30.0,
        max_deliveries: int | None = None,
    ) -> None:
        if ack_wait_s <= 0:
            raise ValueError(f"ack_wait_s={ack_wait_s}: above 0")
        if max_deliveries is not None and max_deliveries < 1:
            raise ValueError(f"max_deliveries={max_deliveries}: at least 1, or None for no end")
        self.names = names
        self.connection = connection
        self.ack_wait_s = ack_wait_s
        self.max_deliveries = max_deliveries
        self._publisher = publisher
        self._max_message_bytes = max_message_bytes
        self._have_stream = False
        self._have_consumer = False
        self.used = False
        self.pulls = pulls

    def put(self, payload: object, *, timeout: float = TIMEOUT_S) -> Coroutine[Any, Any, None]:
        """Store a message; it is on the server's disk when what this returns was awaited.

        Args:
            payload: whatever can be sent as a request. The call itself encodes it: it may change afterwards.
            timeout: seconds to keep trying. A server that is restarted meanwhile stores it once.

        Raises:
            BrokerError: it was not confirmed in that time (it may yet be stored), the queue is full, or the server has
                no JetStream.
            MessageTooLarge: it is above `TRD_MAX_MESSAGE_BYTES` or the server's `max_payload`.
            TypeError, ValueError: the payload cannot travel.
        """
        data = pack(payload, self._publisher, "message")
        if len(data) > self._max_message_bytes:
            raise MessageTooLarge("a message", len(data), self._max_message_bytes)
        return self._put(data, timeout)

    async def _put(self, data: bytes, timeout: float) -> None:
        client = await self.connection.client()
        if len(data) > client.max_payload:
            raise MessageTooLarge("a message", len(data), client.max_payload, payload_limit(self.connection.where))
        headers = {"Nats-Msg-Id": secrets.token_hex(16)}
        end = asyncio.get_running_loop().time() + timeout
        reply = await self._ask(self.names.subject, data, end, "stored nothing", headers)
        answer = json.loads(reply.data)
        if "error" in answer:
            raise self.error(f"cannot store: {answer['error'].get('description', answer['error'])}")

    async def get(self, timeout: float | None = None) -> QueuedMessage:
        """Take the next message.

        Args:
            timeout: seconds to wait for one, or None.

        Raises:
            TimeoutError: none came.
            BrokerError: the server cannot be reached or has no JetStream.
        """
        async with self.pull() as messages:
            return await messages.next(timeout)

    def pull(self, ahead: int = 1) -> PulledMessages:
        """Take one message after the other: `async with queue.pull() as messages: async for message in messages:`.

        Args:
            ahead: how many may be on their way or wait here, so that the next is here when one is done. They count as
                given out: `ack_wait_s` runs. Those that were not handed out go back when the block is left.
        """
        if ahead < 1:
            raise ValueError(f"ahead={ahead}: at least 1")
        return PulledMessages(self, ahead)

    async def depth(self) -> int:
        """How many messages are stored: those that wait and those that are being worked on.

        Raises:
            BrokerError: the server cannot be reached or has no JetStream.
        """
        jetstream = await self._stream()
        try:
            info = await jetstream.stream_info(self.names.stream)
        except Exception as error:
            self.forget()
            raise self.error(f"cannot be asked: {words(error)}") from error
        return int(info.state.messages)

    async def _ask(self, subject: str, data: bytes, end: float, failed: str, headers: dict[str, str] | None) -> Any:
        """Send until the server has answered, through its restart if need be.

        Args:
            end: the loop's time at which to give up.
            failed: what has happened then, for the error.
            headers: of something to store; None for a word about something that was delivered.
        """
        loop = asyncio.get_running_loop()
        reason = "no answer"
        silences = 0
        while (left := end - loop.time()) > 0:
            try:
                if headers is not None:
                    await self._stream()
                if self.connection.connected:
                    client = await self.connection.client()
                    return await client.request(subject, data, timeout=min(left, ATTEMPT_S), headers=headers)
                reason = "not connected"
            except Exception as error:  # it is starting, or stopping, or slow
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
        """Tell the server about a message, and wait until it knows.

        Raises:
            BrokerError: it did not say so in time.
        """
        end = asyncio.get_running_loop().time() + TIMEOUT_S
        await self._ask(reply, data, end, "cannot acknowledge", None)

    async def consumer(self) -> NatsClient:
        """The client, when stream and consumer are there."""
        jetstream = await self._stream()
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
            except Exception as error:
                self.forget()
                raise self.error(f"cannot make the consumer: {words(error)}") from error
            self._have_consumer = True
        return await self.connection.client()

    async def _stream(self) -> JetStreamContext:
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
            except Exception as error:
                raise self.error(f"cannot make the stream: {words(error)}") from error
            self._have_stream = self.used = True
        return jetstream

    def forget(self) -> None:
        """Look again whether stream and consumer are there: a server may come back empty."""
        self._have_stream = self._have_consumer = False

    def error(self, reason: str) -> BrokerError:
        """An error about this queue."""
        return BrokerError("NATS", self.connection.where, f"{self.names.title}: {reason}")

    def __repr__(self) -> str:
        return f"<WorkQueue {self.names.title}>"
