"""Publishes KV events over ZeroMQ, in the way of vLLM: numbered batches, and a second endpoint for earlier ones."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

from triton_distributed.llm.contract.errors import InvalidParameter

if TYPE_CHECKING:
    import zmq.asyncio

KEPT = 10_000
"""Batches that can be asked for later, as many as vLLM keeps."""

QUEUED = 100_000
"""Batches that wait for a slow listener, as with vLLM. Further ones are lost for it."""

_END = b"\xff" * 8


class EventPublisher:
    """Publishes batches.

    Args:
        endpoint: where to publish, e.g. `tcp://127.0.0.1:5557`; with the port `*` a free one.
        replay: where to answer with earlier batches; empty for nowhere.

    Attributes:
        endpoint, replay: with the real ports, after `start`.
    """

    def __init__(self, endpoint: str, replay: str = "") -> None:
        self.endpoint, self.replay = endpoint, replay
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=KEPT)
        self._next = 0
        self._context: zmq.asyncio.Context | None = None
        self._events: Any = None
        self._sockets: list[Any] = []
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Listen. Call it on the event loop.

        Raises:
            ImportError: the extra `kv` is not installed.
            InvalidParameter: an endpoint is invalid, or in use.
        """
        try:
            import zmq
            import zmq.asyncio
        except ImportError as error:
            raise ImportError("KV events over ZeroMQ need pyzmq: pip install 'triton-distributed[kv]'") from error
        self._context = zmq.asyncio.Context()
        self._events = zmq.Socket(self._context, zmq.PUB)  # It never waits, so it needs no coroutine.
        self._events.sndhwm = QUEUED
        replies = self._context.socket(zmq.ROUTER)
        self._sockets = [self._events, replies]
        try:
            for option, socket in (("endpoint", self._events), ("replay", replies)):
                socket.linger = 0
                if address := getattr(self, option):
                    socket.bind(address)
                    setattr(self, option, socket.get_string(zmq.LAST_ENDPOINT))
        except zmq.ZMQError as error:
            self._destroy()
            raise InvalidParameter("kv_events", f"cannot listen on {address!r}: {error}") from error
        if self.replay:
            self._task = asyncio.create_task(self._answer(replies), name=f"replay of {self.replay}")

    def publish(self, payload: bytes) -> None:
        """Publish a batch to all who listen now."""
        number = self._next.to_bytes(8, "big")
        self._next += 1
        self._kept.append((number, payload))
        self._events.send_multipart((b"kv-events", number, payload))

    async def close(self) -> None:
        """Stop listening."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        self._destroy()

    def _destroy(self) -> None:
        if self._context is not None:
            for socket in self._sockets:
                socket.close()
            self._context.term()
            self._context = None

    async def _answer(self, replies: Any) -> None:
        while True:
            caller, *_, first = await replies.recv_multipart()
            for number, payload in list(self._kept):
                if number >= first:
                    await replies.send_multipart((caller, b"", number, payload))
            await replies.send_multipart((caller, b"", _END, b""))
