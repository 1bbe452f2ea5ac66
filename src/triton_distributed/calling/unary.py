"""The single value of a unary call."""

from __future__ import annotations

from typing import Any

from triton_distributed.calling.call import Call
from triton_distributed.calling.item_stream import next_message
from triton_distributed.calling.state import OPEN
from triton_distributed.compiled import caused
from triton_distributed.errors import NotUnary


async def answer(call: Call) -> Any:
    """Wait for the end of a call and return its single value. Leaving early cancels the handler.

    Raises:
        NotUnary: the answer has no item, or more than one.
        Exception: the error that ended the call.
    """
    value = None
    try:
        while True:
            await next_message(call)
            for each in call.items:
                value = each
            # Items of the present instance only: an idempotent call may have had another instance before.
            if call.received > 1:
                raise NotUnary(call.services.target, call.received)
    except StopAsyncIteration:
        if not call.received:
            raise caused(NotUnary(call.services.target, 0), None)
        return value
    finally:
        if call.state <= OPEN:
            call.leave()
