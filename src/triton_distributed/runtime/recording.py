"""Recordings: what one endpoint of a worker is asked and what it answers, for as long as a client listens.

A recording takes the place of the endpoint's handler and calls it. So requests cost nothing while none is recorded.
Requests that run already when it begins are not recorded.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Literal

import msgspec

from triton_distributed.annotated import Annotated, parts
from triton_distributed.context import Context, current
from triton_distributed.payload.codec import encode
from triton_distributed.payload.exceptions import name_and_text
from triton_distributed.serving.endpoint import ServedEndpoint
from triton_distributed.serving.handlers import Handler
from triton_distributed.serving.plain import Encoded, Ready

logger = logging.getLogger("triton_distributed.runtime")

MOST_BYTES = 64 * 2**20
"""Bytes that a recording may hold in a worker: of requests that run, and of those that its client has not taken."""


class Payload(msgspec.Struct):
    """One encoded value.

    Attributes:
        body, buffers: the bytes that travelled, see `payload.codec`.
        after_s: for an item, seconds from the request's begin.
        annotated: the item has an event, comments or an id next to its data.
    """

    body: bytes
    buffers: list[bytes] = []
    after_s: float = 0.0
    annotated: bool = False

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return len(self.body) + sum(map(len, self.buffers))


class Exchange(msgspec.Struct):
    """One request and its answer.

    Attributes:
        id: the request's id.
        began: when its handler began, in seconds since 1970.
        streamed: the caller streamed requests; otherwise there is one.
        requests: the requests.
        items: the items of the answer.
        outcome: `ok`, `error` (the handler raised) or `left` (the caller left, or its deadline was over).
        error: type and text of what the handler raised; empty if it did not.
        took_s: seconds from the start to the end.
        metadata: the request's metadata and travelling values, if these are recorded.
        skipped: the number of requests so far that were not recorded, because they exceed `MOST_BYTES`, or an exchange
            exceeds `TRD_MAX_MESSAGE_BYTES`.
    """

    id: str
    began: float
    streamed: bool = False
    requests: list[Payload] = []
    items: list[Payload] = []
    outcome: Literal["ok", "error", "left"] = "left"
    error: tuple[str, str] = ("", "")
    took_s: float = 0.0
    metadata: dict[str, dict[str, Any]] = {}
    skipped: int = 0


class Recording:
    """Records the requests of an endpoint inside a `with` block; iterate over it for the exchanges.

    Args:
        endpoint: the endpoint.
        metadata: also record metadata and travelling values, which may contain secrets.
        most_bytes: see `MOST_BYTES`.

    Raises, when it is entered:
        RuntimeError: the endpoint is recorded already.
    """

    def __init__(self, endpoint: ServedEndpoint, metadata: bool = False, most_bytes: int = MOST_BYTES) -> None:
        self.metadata = metadata
        self.held = self.skipped = 0
        self._endpoint = endpoint
        self._original = endpoint.handler
        self._most = most_bytes
        self._count = 0
        self._done: deque[tuple[Exchange, int]] = deque()  # Each with its size; `most_bytes` bounds them.
        self._came = asyncio.Event()
        self.over = False

    def __enter__(self) -> Recording:
        if is_recorded(self._endpoint):
            raise RuntimeError(f"{self._endpoint.name} is recorded already, by another client")
        self._endpoint.handler = _Recorder(self._original, self)
        logger.warning("%s: requests and answers are recorded from now on", self._endpoint.name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over = True
        self._endpoint.handler = self._original
        words = "%s: requests are recorded no longer: %d were, %d were left out for their size"
        logger.warning(words, self._endpoint.name, self._count, self.skipped)

    def __aiter__(self) -> Recording:
        return self

    async def __anext__(self) -> Exchange:
        while not self._done:
            self._came.clear()
            await self._came.wait()
        exchange, size = self._done.popleft()
        self.held -= size
        exchange.skipped = self.skipped
        return exchange

    def hold(self, size: int) -> bool:
        """Count bytes that are held from now on; False if they are too many, and are not counted."""
        if self.over or self.held + size > self._most:
            return False
        self.held += size
        return True

    def skip(self, size: int) -> None:
        """Give up a request of which `size` bytes are held."""
        self.held -= size
        self.skipped += 1

    def leave_out(self) -> None:
        """Do not count the last exchange that was taken: it cannot be sent to the client."""
        self._count -= 1
        self.skipped += 1

    def add(self, exchange: Exchange, size: int) -> None:
        """Take a finished exchange of which `size` bytes are held."""
        self._count += 1
        self._done.append((exchange, size))
        self._came.set()


def is_recorded(endpoint: ServedEndpoint) -> bool:
    """Whether the requests of an endpoint are recorded now."""
    return isinstance(endpoint.handler, _Recorder)


_running: contextvars.ContextVar[_Run | None] = contextvars.ContextVar("triton_distributed_recorded", default=None)
"""The recorded request whose handler runs here. A request's task begins without one."""


class _Run:
    """One request that is being recorded."""

    def __init__(self, recording: Recording, context: Context | None, streamed: bool) -> None:
        self._recording: Recording | None = recording  # None when it has ended, or was given up.
        self._size = 0
        self._began = time.perf_counter()
        metadata: dict[str, dict[str, Any]] = {}
        if recording.metadata and context is not None:
            metadata = {"metadata": dict(context.metadata), "travelling": dict(context.travelling)}
        self._exchange = Exchange(
            context.id() if context is not None else "", time.time(), streamed, [], [], metadata=metadata
        )

    def asked(self, body: Any, buffers: Sequence[Any] | None) -> None:
        """Record a request."""
        self._keep(self._exchange.requests, body, buffers or (), False)

    def answered(self, item: Any) -> None:
        """Record an item, or several that a thread has encoded."""
        if isinstance(item, Ready):
            for each in item:
                if isinstance(each, Encoded):
                    self._keep(self._exchange.items, each.body, each.buffers, False)
                else:
                    self._keep(self._exchange.items, each, (), False)
            return
        annotated = isinstance(item, Annotated)
        try:
            data = encode(parts(item) if annotated else item, "item")
        except (TypeError, ValueError):  # The request itself ends with this error.
            return
        if isinstance(data, bytes):
            self._keep(self._exchange.items, data, (), annotated)
        else:
            self._keep(self._exchange.items, data.body, data.buffers, annotated)

    def _keep(self, where: list[Payload], body: Any, buffers: Sequence[Any], annotated: bool) -> None:
        recording = self._recording
        if recording is None:
            return
        size = len(body) + sum(memoryview(each).nbytes for each in buffers) + 64  # 64: what the object itself takes
        if not recording.hold(size):
            recording.skip(self._size)
            self._recording = None
            return
        self._size += size
        after_s = time.perf_counter() - self._began
        where.append(Payload(bytes(body), [memoryview(each).tobytes() for each in buffers], after_s, annotated))

    def ended(self, outcome: Literal["ok", "error", "left"], error: BaseException | None = None) -> None:
        """The request has ended. Later calls have no effect."""
        recording, self._recording = self._recording, None
        if recording is None or recording.over:
            return
        exchange = self._exchange
        exchange.outcome, exchange.took_s = outcome, time.perf_counter() - self._began
        if error is not None:
            exchange.error = name_and_text(error)
        recording.add(exchange, self._size)


class _Recorder(Handler):
    """A handler that records what another one is asked and answers."""

    def __init__(self, original: Handler, recording: Recording) -> None:
        self.__dict__.update(original.__dict__)
        self._original, self._recording = original, recording
        self.decode = self._decode

    def _begun(self) -> _Run:
        run = _running.get()
        if run is None:
            run = _Run(self._recording, current.get(), self.takes_stream)
            _running.set(run)
        return run

    def _decode(self, body: Any, buffers: Any = None) -> Any:
        # Before the handler gets it: the memory is the handler's from then on, and may change.
        self._begun().asked(body, buffers)
        return self._original.decode(body, buffers)

    def open(self, request: Any, context: Context) -> AsyncIterator[Any]:
        return _Items(self._original.open(request, context), self._begun())


class _Items:
    """The items of a handler, which are recorded as they pass. Other attributes are those of the handler's iterator."""

    __slots__ = ("_items", "_run")

    def __init__(self, items: AsyncIterator[Any], run: _Run) -> None:
        self._items = items
        self._run = run

    def __aiter__(self) -> _Items:
        return self

    async def __anext__(self) -> Any:
        try:
            item = await self._items.__anext__()
        except StopAsyncIteration:
            self._run.ended("ok")
            raise
        except Exception as error:
            self._run.ended("error", error)
            raise
        self._run.answered(item)
        return item

    async def aclose(self) -> None:
        """Close the handler's iterator. Before its end this means that the caller has left."""
        self._run.ended("left")
        if hasattr(self._items, "aclose"):
            await self._items.aclose()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._items, name)
