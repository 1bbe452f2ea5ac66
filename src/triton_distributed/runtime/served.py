"""One endpoint that this runtime serves: who is let in, who waits, who runs."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import msgspec

from triton_distributed.names import EndpointName, Instance
from triton_distributed.observe import Outcome, Stats
from triton_distributed.runtime.context import Context
from triton_distributed.runtime.handlers import Handler
from triton_distributed.runtime.serving import Serving
from triton_distributed.transport.stream import Stream
from triton_distributed.wire.assembly import Body, Memory
from triton_distributed.wire.frames import RejectCode

_INFINITE = float("inf")
CUT_S = 5.0  # what a handler that was cut has for its finally blocks before the runtime goes on without it
_metadata = msgspec.msgpack.Decoder(dict[str, Any]).decode
_split = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode


class ServedEndpoint:
    """An endpoint, its handler, and the requests that are here.

    Args:
        loop: the running loop.
        name: of the endpoint.
        handler: what serves it.
        max_inflight: handlers that may run at once; None for as many as sessions may bring.
        max_queue: requests that may wait for one of them; beyond it they are refused at once.
        graceful: a drain lets what runs finish; else it is cut at once.

    Attributes:
        instance: what is registered.
        running: the requests whose handlers run.
        draining: no further request is let in.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        name: EndpointName,
        handler: Handler,
        instance: Instance,
        *,
        max_inflight: int | None,
        max_queue: int,
        graceful: bool,
    ) -> None:
        self.loop = loop
        self.name = name
        self.handler = handler
        self.instance = instance
        self.max_inflight = max_inflight
        self.max_queue = max_queue
        self.draining = False
        self.graceful = graceful
        self.running: set[Serving] = set()
        self.stats = Stats()
        self._queue: deque[Serving] = deque()  # at most max_queue
        self._idle: asyncio.Future[None] | None = None

    def admit(self, stream: Stream, timeout_s: float, metadata: Body, body: Body, buffers: list[Memory] | None) -> None:
        """Let a request in, let it wait, or refuse it."""
        context = _context(stream, metadata) if metadata else ServedContext(stream)
        serving = Serving(self, stream, context, body, buffers)
        if self.draining:
            serving.refuse(RejectCode.DRAINING, "it is shutting down")
            return
        if timeout_s != _INFINITE:
            if not timeout_s > 0:
                serving.expire()
                return
            context.deadline = self.loop.time() + timeout_s
            serving.watch_deadline(self.loop, context.deadline)
        limit = self.max_inflight
        if limit is None or len(self.running) < limit:
            self._start(serving)
        elif len(self._queue) < self.max_queue:
            self._queue.append(serving)
        else:
            serving.refuse(
                RejectCode.OVERLOADED,
                f"{len(self.running)} requests run and {len(self._queue)} wait, which is all it takes: "
                f"max_inflight={limit}, max_queue={self.max_queue}",
            )

    def _start(self, serving: Serving) -> None:
        """Tell the caller that the handler begins, then let it begin in a later step of the loop."""
        self.running.add(serving)
        self.stats.inflight += 1
        serving.admitted = True
        serving.stream.connection.accept(serving.stream, serving.begin)

    def finished(self, serving: Serving) -> None:
        """A handler has ended: the next in the queue may begin."""
        self.running.discard(serving)
        self.stats.inflight -= 1
        if self._queue and not self.draining:
            self._start(self._queue.popleft())
        if not self.running and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def left_queue(self, serving: Serving) -> None:
        """A request that waited was cancelled, or its time is over."""
        try:
            self._queue.remove(serving)
        except ValueError:
            return  # it was refused before it got there

    @staticmethod
    def split(batch: Body) -> list[Any]:
        """The encoded items of a BATCH, to be decoded one by one against the handler's types."""
        return _split(batch)

    def drain(self) -> None:
        """Let nobody in any more; what waits is refused, so that it goes elsewhere, and what runs goes on."""
        self.draining = True
        waiting, self._queue = self._queue, deque()
        for serving in waiting:
            serving.refuse(RejectCode.DRAINING, "it is shutting down")

    async def idle(self) -> None:
        """Wait until no handler runs. One waiter at a time."""
        while self.running:
            self._idle = self.loop.create_future()
            await self._idle

    async def cut(self) -> list[str]:
        """Cancel what still runs and wait for it; returns the ids of those requests.

        Those whose handlers have not begun are refused, so that they go elsewhere.
        """
        running = list(self.running)
        for serving in running:
            serving.cancel(Outcome.CANCELLED)
        cut = {each.task: each.context.id() for each in running if each.task is not None}
        if cut:
            await asyncio.wait(cut, timeout=CUT_S)
        return list(cut.values())


def _context(stream: Stream, metadata: Body) -> Context:
    try:
        values = _metadata(metadata)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ServedContext(stream)  # metadata is advice; the request itself is judged by its own bytes
    name = values.pop("\0id", None)
    context = ServedContext(stream)
    context.metadata = values
    if isinstance(name, str):
        context._id = name
    return context


class ServedContext(Context):
    """A context whose id, unless the caller chose one, is composed from its session and stream when asked for."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def id(self) -> str:
        if self._id is None:
            peer = self._stream.connection.peer
            self._id = f"{peer.nonce if peer else 0:x}-{self._stream.id:x}"
        return self._id
