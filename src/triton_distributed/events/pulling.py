"""The consumer's side of a work queue: it requests messages, hands them out, and acknowledges them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from triton_distributed.errors import BrokerError, RuntimeClosed
from triton_distributed.events.event import unpack
from triton_distributed.events.jetstream import JetStream

logger = logging.getLogger("triton_distributed.events")

PULL_S = 30.0
"""Seconds after which a request for messages ends and is repeated."""

GRACE_S = 1.0
"""Seconds to wait for the server's report that a request has ended."""

PAUSE_S = 0.25
"""Seconds before the next request if the server has refused the last one or is away."""

NO_MESSAGES, REQUEST_OVER = "404", "408"  # Statuses of a request that has ended without an error.


class QueuedMessage:
    """A message that was taken from a queue. Call `ack()` when its work is done.

    Attributes:
        attempt: 1 for the first delivery, more for a repeated one.
    """

    def __init__(self, jetstream: JetStream, body: bytes, reply: str, attempt: int) -> None:
        self._jetstream, self._body, self._reply = jetstream, body, reply
        self.attempt = attempt

    @property
    def data(self) -> Any:
        """The payload; each access decodes it again.

        Raises:
            DecodeError: the body was not written by `put`.
        """
        return unpack(self._body)[0]

    @property
    def publisher(self) -> int:
        """The instance id of the runtime that put the message."""
        return unpack(self._body)[1]

    async def ack(self) -> None:
        """Report that the work is done: the queue deletes the message. Wait for the server. Repeating is harmless.

        Raises:
            BrokerError: the server did not confirm within 10 s, so the message may be delivered again.
        """
        await self._jetstream.confirm(self._reply, b"+ACK")

    async def nack(self, delay: float = 0.0) -> None:
        """Return the message to the queue, which delivers it again to any consumer.

        Args:
            delay: seconds before the message is delivered again.

        Raises:
            BrokerError: the server did not confirm within 10 s; the message is delivered again after `ack_wait_s`.
        """
        if delay < 0:
            raise ValueError(f"delay={delay}: must be at least 0")
        await self._jetstream.confirm(self._reply, nack_text(delay))

    async def in_progress(self) -> None:
        """Report that the work goes on: `ack_wait_s` begins again.

        Raises:
            BrokerError: the server did not confirm within 10 s.
        """
        await self._jetstream.confirm(self._reply, b"+WPI")

    def __repr__(self) -> str:
        return f"<QueuedMessage of {self._jetstream.names.title}, attempt {self.attempt}>"


class PulledMessages:
    """Messages of a queue, one after another. Made by `queue.pull()`; use it in an `async with` block."""

    def __init__(
        self, jetstream: JetStream, ahead: int, max_deliveries: int | None, pulls: set[PulledMessages]
    ) -> None:
        self._jetstream = jetstream
        self._ahead = ahead
        self._max_deliveries = max_deliveries
        self._pulls = pulls
        self._ready: deque[tuple[Any, float]] = deque()  # Messages with their times of arrival, at most `ahead`.
        self._asked = 0  # Messages that the server may still send for the present request.
        self._until = 0.0  # Time on the loop's clock at which that request has certainly ended.
        self._pause = False
        self._changed = asyncio.Event()
        self._ended = False
        self._subscribed: Any = None
        self._inbox = ""

    async def __aenter__(self) -> PulledMessages:
        self._jetstream.connection.reconnected.append(self._asking_is_over)
        self._pulls.add(self)
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._jetstream.connection.reconnected.remove(self._asking_is_over)
        self._pulls.discard(self)
        if self._subscribed is None:
            return
        try:
            await self._subscribed.unsubscribe()  # This also ends the present request at the server.
            for message, _ in self._ready:
                await message.respond(nack_text(0.0))
        except Exception as error:  # The messages are delivered again after `ack_wait_s`.
            logger.debug("%s: cannot return messages to the queue: %s", self._jetstream.names.title, error)
        self._ready.clear()

    @property
    def title(self) -> str:
        """The name of the queue, for error texts."""
        return self._jetstream.names.title

    @property
    def ready(self) -> int:
        """The number of messages that have arrived and were not taken yet."""
        return len(self._ready)

    @property
    def requested(self) -> int:
        """The number of messages that the server may still send for the present request."""
        return self._asked

    def __aiter__(self) -> AsyncIterator[QueuedMessage]:
        return self

    async def __anext__(self) -> QueuedMessage:
        return await self.next()

    async def next(self, timeout: float | None = None) -> QueuedMessage:
        """The next message.

        Args:
            timeout: seconds to wait for a message; None for no limit.

        Raises:
            TimeoutError: no message came in that time.
            BrokerError: the server could not be reached, or refused, at the first request.
            RuntimeClosed: the runtime was shut down.
        """
        loop = asyncio.get_running_loop()
        end = None if timeout is None else loop.time() + timeout
        while True:
            if self._ended:
                raise RuntimeClosed("taking a message")
            while self._ready:
                if (message := await self._next_ready()) is not None:
                    return message
            now = loop.time()
            left = PULL_S if end is None else end - now
            if left <= 0 and (not self._asked or now > self._until):
                raise TimeoutError(f"{self._jetstream.names.title}: no message within {timeout:g} s")
            if left > 0 and (not self._asked or now > self._until):
                await self._ask(min(left, PULL_S))
            self._changed.clear()
            if not self._ready:
                await self._wait(max(0.001, (self._until if self._asked else now + min(PAUSE_S, left)) - loop.time()))

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _next_ready(self) -> QueuedMessage | None:
        message, arrived = self._ready.popleft()
        if asyncio.get_running_loop().time() - arrived > self._jetstream.ack_wait_s:
            return None  # The server has given the message to another consumer by now.
        attempt = message.metadata.num_delivered
        limit = self._max_deliveries
        if limit is not None and attempt > limit:
            logger.error("%s: a message is dropped after %d deliveries without ack", self._jetstream.names.title, limit)
            await self._jetstream.confirm(message.reply, b"+TERM")
            return None
        return QueuedMessage(self._jetstream, message.data, message.reply, attempt)

    async def _ask(self, seconds: float) -> None:
        """Request messages for `seconds`. If that fails after the queue was in use, the next call pauses first."""
        jetstream = self._jetstream
        loop = asyncio.get_running_loop()
        if self._pause:
            self._pause = False
            await asyncio.sleep(min(PAUSE_S, seconds))
        try:
            client = await jetstream.consumer()
            if self._subscribed is None:
                self._inbox = client.new_inbox()
                self._subscribed = await client.subscribe(self._inbox, cb=self._arrived)
            request = {"batch": self._ahead, "expires": int(seconds * 1e9)}
            await client.publish(
                f"$JS.API.CONSUMER.MSG.NEXT.{jetstream.names.stream}.{jetstream.names.consumer}",
                json.dumps(request).encode(),
                reply=self._inbox,
            )
        except BrokerError:
            if not jetstream.used:
                raise
            self._pause = True
            return
        self._asked = self._ahead
        self._until = loop.time() + seconds + GRACE_S

    async def _arrived(self, message: Any) -> None:
        status = (message.headers or {}).get("Status") if not message.data else None
        if status is None:
            self._asked = max(0, self._asked - 1)
            self._ready.append((message, asyncio.get_running_loop().time()))
        else:
            if status not in (NO_MESSAGES, REQUEST_OVER):
                self._jetstream.forget()  # 409 or 503: the consumer is gone, or the server is not ready.
                self._pause = True
            self._asked = 0
        self._changed.set()

    def end(self) -> None:
        """End every `next` call because the runtime shuts down."""
        self._ended = True
        self._changed.set()

    def _asking_is_over(self) -> None:
        """Forget the present request after a reconnection, as the server has done."""
        self._asked = 0
        self._jetstream.forget()
        self._changed.set()


def nack_text(delay: float) -> bytes:
    """The acknowledgement with which JetStream delivers a message again after `delay` seconds."""
    return b"-NAK" if not delay else b"-NAK " + json.dumps({"delay": int(delay * 1e9)}).encode()
