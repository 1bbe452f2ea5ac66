"""The requests that a caller streams to a handler, as the handler iterates over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from triton_distributed.errors import RequestIncomplete
from triton_distributed.transport.stream import Stream
from triton_distributed.wire import frames as f
from triton_distributed.wire.assembly import Body, Memory
from triton_distributed.wire.states import CLOSED


class RequestStream:
    """An async iterator over requests. It continues after an error or a cancellation of its reader.

    Args:
        stream: the stream on which the requests come.
        request_id: the id of the call, for error texts.
        body: the first request, if it came with the call; otherwise empty.
        buffers: the out-of-band buffers of `body`.
        decode: one encoded request and its buffers → the request.
        split: a batch → its encoded requests.
    """

    __slots__ = ("_batch", "_closed", "_decode", "_first", "_request_id", "_split", "_stream", "_taken")

    def __init__(
        self,
        stream: Stream,
        request_id: Callable[[], str],
        body: Body,
        buffers: list[Memory] | None,
        decode: Callable[[Any, list[Memory] | None], Any],
        split: Callable[[Body], list[Any]],
    ) -> None:
        self._stream = stream
        self._request_id = request_id
        self._first: tuple[Body, list[Memory] | None] | None = (body, buffers) if len(body) else None
        self._decode = decode
        self._split = split
        self._batch: Iterator[Any] = iter(())
        self._taken = 0
        self._closed = False

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Any:
        """The next request.

        Raises:
            StopAsyncIteration: the caller has sent its last request.
            InvalidRequest: the request does not fit the handler; the requests after it can be read.
            RequestIncomplete: the caller is lost, or has left, before its last request.
        """
        while not self._closed:
            for each in self._batch:
                self._taken += 1
                return self._decode(each, None)
            stream = self._stream
            if self._first is not None:
                (body, buffers), self._first = self._first, None
                self._taken += 1
                return self._decode(body, buffers)
            if stream.inbox:
                cost, kind, _, payload, buffers = stream.inbox.popleft()
                stream.read(cost)
                if kind != f.BATCH:
                    self._taken += 1
                    return self._decode(payload, buffers)
                self._batch = iter(self._split(payload))
            elif stream.state == CLOSED:
                reason = stream.lost or "the caller has left, or its time is over"
                raise RequestIncomplete(self._request_id(), self._taken, reason)
            elif stream.finished:
                break
            else:
                await stream.readable()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Read no more. `contextlib.aclosing` needs this method."""
        self._closed = True
