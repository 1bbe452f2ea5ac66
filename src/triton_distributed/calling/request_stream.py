"""The further requests of a caller that streams them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from triton_distributed.payload.codec import encode
from triton_distributed.transport.stream import Stream
from triton_distributed.wire import frames as f
from triton_distributed.wire.states import State


async def send_requests(stream: Stream, requests: AsyncIterator[object]) -> None:
    """Send requests until they end or the response ends.

    Args:
        stream: the stream, on which the first request was sent.
        requests: the caller's iterator; a generator is closed at the end.

    Raises:
        Exception: the iterator raised it, or a request cannot be encoded. The stream is cancelled then.
    """
    try:
        async for each in requests:
            data = encode(each, "request")
            if not isinstance(data, bytes):
                await stream.send(data.body, data.buffers)
                del data  # A bytearray cannot be resized while something refers to its memory.
            elif len(data) > f.SMALL:
                await stream.send(data, ())
            elif stream.push(data):
                await stream.writable()
            if stream.state in (State.RECEIVED, State.CLOSED):
                return
        stream.end()
    except (Exception, asyncio.CancelledError):
        stream.abort(f.CANCEL)
        raise
    finally:
        if isinstance(requests, AsyncGenerator):
            await requests.aclose()
