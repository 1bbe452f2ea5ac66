"""The items of a native call."""

from __future__ import annotations

from typing import Generic, TypeVar

from triton_distributed.calling.call import Call
from triton_distributed.calling.response_stream import Reading, next_message
from triton_distributed.calling.state import FAILED, OPEN, READ

ItemT = TypeVar("ItemT", covariant=True)


class ItemStream(Generic[ItemT]):
    """The items of one call. The call has begun when this object exists.

    Iterate over the stream with `async for` or `anext`, inside `async with` or without it. Leaving the loop or the
    block early, and dropping the stream, read or not, cancels the handler. `await stream.accepted()` waits until a
    handler has the request, so that a refusal raises before the first item is needed.

    Raises, from iteration and from `accepted`:
        NoInstances, InstanceNotFound, ConnectionFailed: no instance can take the request.
        ContractMismatch: the worker serves the endpoint with another contract.
        Overloaded, Draining, Paused: the workers that were tried refused the request.
        InvalidRequest: the request does not fit the contract.
        DeadlineExceeded: the call's time is over.
        StreamIncomplete: the connection was lost after the handler had begun.
        WrongLoop: the stream is used on another event loop than that of its call.

    Raises, from iteration only:
        RemoteError: the handler raised; the error is also an instance of the type that was raised.
        DecodeError: an item does not fit the contract.
        StreamClosed: the stream was left or closed before.
    """

    __slots__ = ("__weakref__", "_call")

    def __init__(self, call: Call) -> None:
        self._call = call

    def __aiter__(self) -> Reading:
        call = self._call
        # An `async for` that begins on a stream whose end is known would look like an empty answer.
        if call.state == FAILED:
            raise call.stream_closed_error()
        if call.state == READ:
            raise RuntimeError(
                f"the stream from {call.services.target} was already read to its end ({call.received} items), and a "
                "stream can be read only once: keep the items, or call again"
            )
        return Reading(call, True)

    async def __anext__(self) -> ItemT:
        call = self._call
        while True:
            for item in call.items:
                return item  # type: ignore[no-any-return]
            await next_message(call)

    async def __aenter__(self) -> ItemStream[ItemT]:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._call.leave("its `async with` was left")

    def __del__(self) -> None:
        call = self._call
        if call.state <= OPEN and not call.reading:
            call.services.from_finalizer(call.leave)

    def cancel(self) -> bool:
        """Cancel the handler. False if the call was already over."""
        under_way = self._call.state <= OPEN
        self._call.cancel()
        return under_way

    @property
    def instance_id(self) -> int | None:
        """The id of the instance that has the request; None before the request was sent."""
        return self._call.instance.id if self._call.instance is not None else None

    @property
    def request_id(self) -> str:
        """The request's id, as the handler sees it; empty before the request was sent."""
        return self._call.request_id

    def __repr__(self) -> str:
        call = self._call
        state = "over" if call.state > OPEN else "open" if call.stream is not None else "being sent"
        return f"<ItemStream from {call.services.target} {state}, {call.received} items received>"
