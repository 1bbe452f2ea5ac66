"""Work queues: NATS JetStream keeps each message until a consumer has acknowledged it."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Coroutine
from typing import Any

from triton_distributed.errors import MessageTooLarge
from triton_distributed.events.event import pack
from triton_distributed.events.jetstream import TIMEOUT_S, JetStream, QueueNames
from triton_distributed.events.nats import payload_limit, words
from triton_distributed.events.pulling import PulledMessages, QueuedMessage
from triton_distributed.external.nats import NatsConnection


class WorkQueue:
    """Messages that each go to one consumer, again if it does not finish. Made by `component.queue(name)`.

    Any number of processes put and any number take. What is stored survives its producer, its consumers and a restart
    of the server. A message is delivered at least once: when its consumer died after the work and before `ack`, twice.

    Args:
        connection: the runtime's.
        names: what it is called.
        publisher: the instance id of the runtime.
        max_message_bytes: of a payload; the server's own limit is usually lower.
        pulls: the consumers of the runtime that are at work, which it ends when it closes.
        ack_wait_s: seconds after which a message that is neither acknowledged nor in progress goes to the next
            consumer. It belongs to the queue: where processes differ, the one that began to consume last decides.
        max_deliveries: a message that was delivered this many times and is not acknowledged is dropped, with an error
            in the log of the process that would have received it next; None for no limit.

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
            raise ValueError(f"ack_wait_s={ack_wait_s}: above 0")
        if max_deliveries is not None and max_deliveries < 1:
            raise ValueError(f"max_deliveries={max_deliveries}: at least 1, or None for no end")
        self.jetstream = JetStream(connection, names, ack_wait_s)
        self._max_deliveries = max_deliveries
        self._publisher = publisher
        self._max_message_bytes = max_message_bytes
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
        jetstream = self.jetstream
        client = await jetstream.connection.client()
        if len(data) > client.max_payload:
            raise MessageTooLarge("a message", len(data), client.max_payload, payload_limit(jetstream.connection.where))
        headers = {"Nats-Msg-Id": secrets.token_hex(16)}
        end = asyncio.get_running_loop().time() + timeout
        reply = await jetstream.ask(jetstream.names.subject, data, end, "stored nothing", headers)
        answer = json.loads(reply.data)
        if "error" in answer:
            raise jetstream.error(f"cannot store: {answer['error'].get('description', answer['error'])}")

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
            ahead: messages that may be on their way or wait here, so that the next one is here when one is done. Their
                `ack_wait_s` runs already. Those that were not taken go back when the block is left.
        """
        if ahead < 1:
            raise ValueError(f"ahead={ahead}: at least 1")
        return PulledMessages(self.jetstream, ahead, self._max_deliveries, self.pulls)

    async def depth(self) -> int:
        """How many messages are stored: those that wait and those that are being worked on.

        Raises:
            BrokerError: the server cannot be reached or has no JetStream.
        """
        jetstream = self.jetstream
        context = await jetstream.stream()
        try:
            info = await context.stream_info(jetstream.names.stream)
        except Exception as error:
            jetstream.forget()
            raise jetstream.error(f"cannot be asked: {words(error)}") from error
        return int(info.state.messages)

    def __repr__(self) -> str:
        return f"<WorkQueue {self.jetstream.names.title}>"
