"""Work queues: NATS JetStream keeps each message until a consumer has acknowledged it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Coroutine
from typing import Any

from triton_distributed.errors import MessageTooLarge
from triton_distributed.events.event import pack
from triton_distributed.events.jetstream import TIMEOUT_S, JetStream, QueueNames
from triton_distributed.events.nats import payload_limit, words
from triton_distributed.events.pulling import PulledMessages, QueuedMessage
from triton_distributed.external.nats import NatsConnection


class WorkQueue:
    """A work queue. Each message goes to one consumer, and again to one if it does not finish. See `component.queue()`.

    Any number of processes may put and take messages. A stored message survives its producer, its consumers and a
    restart of the server. It is delivered at least once: twice, for example, if its consumer dies between the end of
    the work and `ack`.

    Args:
        connection: the runtime's connection to NATS.
        names: the names of the queue at the server.
        publisher: the instance id of the runtime.
        max_message_bytes: the largest payload, in bytes; the server's own limit is usually lower.
        pulls: the runtime's open consumers, which the runtime ends when it closes.
        ack_wait_s: seconds after which a message that is neither acknowledged nor in progress goes to the next
            consumer. It is a property of the queue: if processes differ, the last one that began to consume decides.
        max_deliveries: the most deliveries of a message. A message that is still not acknowledged is dropped, with an
            error in the log of the process that would have received it next; None for no limit.

    Attributes:
        jetstream: the queue at the server.
        pulls: see above.
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
            raise ValueError(f"ack_wait_s={ack_wait_s}: must be above 0")
        if max_deliveries is not None and max_deliveries < 1:
            raise ValueError(f"max_deliveries={max_deliveries}: must be at least 1, or None for no limit")
        self.jetstream = JetStream(connection, names, ack_wait_s)
        self._max_deliveries = max_deliveries
        self._publisher = publisher
        self._max_message_bytes = max_message_bytes
        self.pulls = pulls

    def put(self, payload: object, *, timeout: float = TIMEOUT_S) -> Coroutine[Any, Any, None]:
        """Store a message. When the returned coroutine has been awaited, the message is on the server's disk.

        Args:
            payload: any value that can be sent as a request. The call itself encodes it, so it may change afterwards.
            timeout: seconds to keep trying. Even if the server restarts meanwhile, the message is stored once.

        Raises:
            BrokerError: the server did not confirm in time (the message may yet be stored), the queue is full, or the
                server has no JetStream.
            MessageTooLarge: the message exceeds `TRD_MAX_MESSAGE_BYTES` or the server's `max_payload`.
            TypeError, ValueError: the payload cannot be encoded.
        """
        data = pack(payload, self._publisher, "message")
        if len(data) > self._max_message_bytes:
            raise MessageTooLarge("a message", len(data), self._max_message_bytes)
        return self._put(data, timeout)

    async def _put(self, data: bytes, timeout: float) -> None:
        jetstream = self.jetstream
        client = await jetstream.connection.client()
        if len(data) > client.max_payload:
            raise MessageTooLarge("a message", len(data), client.max_payload, payload_limit(jetstream.connection.where))
        headers = {"Nats-Msg-Id": os.urandom(16).hex()}
        end = asyncio.get_running_loop().time() + timeout
        reply = await jetstream.ask(jetstream.names.subject, data, end, "stored nothing", headers)
        answer = json.loads(reply.data)
        if "error" in answer:
            raise jetstream.error(f"cannot store: {answer['error'].get('description', answer['error'])}")

    async def get(self, timeout: float | None = None) -> QueuedMessage:
        """Take the next message.

        Args:
            timeout: seconds to wait for a message; None for no limit.

        Raises:
            TimeoutError: no message came in that time.
            BrokerError: the server cannot be reached or has no JetStream.
        """
        async with self.pull() as messages:
            return await messages.next(timeout)

    def pull(self, ahead: int = 1) -> PulledMessages:
        """Take one message after another: `async with queue.pull() as messages: async for message in messages:`.

        Args:
            ahead: the number of messages to request in advance, so that the next one is here when one is done. Their
                `ack_wait_s` runs already. Messages that were not taken go back to the queue at the end of the block.
        """
        if ahead < 1:
            raise ValueError(f"ahead={ahead}: must be at least 1")
        return PulledMessages(self.jetstream, ahead, self._max_deliveries, self.pulls)

    async def depth(self) -> int:
        """The number of stored messages: those that wait and those that consumers are working on.

        Raises:
            BrokerError: the server cannot be reached or has no JetStream.
        """
        jetstream = self.jetstream
        context = await jetstream.stream()
        try:
            info = await context.stream_info(jetstream.names.stream)
        except Exception as error:  # nats-py raises errors of many types.
            jetstream.forget()
            raise jetstream.error(f"cannot read its state: {words(error)}") from error
        return int(info.state.messages)

    def __repr__(self) -> str:
        return f"<WorkQueue {self.jetstream.names.title}>"
