"""Waits until a handler has the request of a call: the difference between "sent" and "accepted"."""

from __future__ import annotations

import asyncio

from triton_distributed.calling.call import Call
from triton_distributed.calling.state import CLOSED, FAILED, OPEN
from triton_distributed.errors import RemoteError

CANCELLED = "the task that waited for its acceptance was cancelled, which cancels the handler"


async def accepted(call: Call) -> None:
    """Wait until a handler has begun with the request, after all other attempts.

    The worker says so only if it is asked, because ACCEPT alone does not say whether the request is valid: it leaves
    before the request is decoded. A call that has received an item, or its end, has been accepted.

    Raises:
        RuntimeError: another task reads the call, or waits for its acceptance.
        WrongLoop: another thread or event loop runs this than the call's own.
        Exception: the error that ended the call before a handler had begun.
    """
    call.services.check_loop("accepted")
    while call.state <= OPEN:
        if call.received:
            return
        stream, sending = call.stream, call.sending
        waiter: asyncio.Future[None]
        if sending is not None and not sending.done():
            waiter = asyncio.shield(sending)
        else:
            assert stream is not None
            if stream.begun or stream.inbox:
                return
            stream.ask_begun()
            waiter = stream.next_readable()
        try:
            await waiter
        except asyncio.CancelledError:
            call.leave(CANCELLED)
            raise
    _raise_rejection(call)


def _raise_rejection(call: Call) -> None:
    """Raise the error of a call that is over, unless a handler had begun."""
    stream = call.stream
    if call.received or (stream is not None and (stream.begun or stream.inbox)) or isinstance(call.error, RemoteError):
        return
    if call.state == FAILED:
        raise call.stream_closed_error()
    if call.error is not None or call.state == CLOSED:
        call.take()
