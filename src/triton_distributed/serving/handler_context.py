"""The context of a request that is being served."""

from __future__ import annotations

import asyncio
from types import MappingProxyType
from typing import Any

import msgspec

from triton_distributed.context import (
    CLEANUP_S,
    HIGHEST_PRIORITY,
    ID,
    LOWEST_PRIORITY,
    PRIORITY,
    RESUME,
    TRAVELLING,
    AttachedCall,
    Context,
)
from triton_distributed.errors import DecodeError
from triton_distributed.observe.traceparent import drop_invalid
from triton_distributed.payload.codec import decode, encode
from triton_distributed.transport.stream import Stream
from triton_distributed.wire.assembly import Body, message_bytes
from triton_distributed.wire.frames import SMALL

_metadata = msgspec.msgpack.Decoder(dict[str, Any]).decode
_raw_metadata = msgspec.msgpack.Decoder(dict[str, msgspec.Raw]).decode


class ServedContext(Context):
    """The context of a served request. If the caller chose no id, the id is composed from session and stream on use."""

    _cut = False

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def now(self) -> float:
        return self._stream.session.loop.time()

    def attach_token(self, token: bytes) -> None:
        self._stream.checkpoint(token)

    def checkpoint(self, token: Any) -> None:
        data = encode(token, "token")
        if not isinstance(data, bytes) or len(data) > SMALL:
            raise ValueError(f"a resume token has at most {SMALL:,} bytes and holds no arrays")
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # In a thread, items may wait to be sent: the token waits with them.
            self._pending_token = data
        else:
            self._stream.checkpoint(data)

    def fits(self, value: Any) -> bool:
        """Whether a value can be an item of the answer: it can be encoded, and both ends accept its size."""
        try:
            data = encode(value, "item")
            body, buffers = (data, []) if isinstance(data, bytes) else (data.body, data.buffers)
            return message_bytes(len(body), buffers) <= self._stream.session.send_limit
        except (TypeError, ValueError):
            return False

    def cut(self) -> None:
        """Cancel the open calls of the handler, because it is cancelled. Calls that it makes later are clean-up."""
        self._cut = True
        self.calls_deadline = self.now() + CLEANUP_S
        self.kill()

    def attach(self, call: AttachedCall) -> None:
        if not self._cut:
            super().attach(call)
        elif self._calls is not None:
            self._calls[call] = None
        else:
            self._calls = {call: None}

    def id(self) -> str:
        if self._id is None:
            peer = self._stream.session.connection.peer
            self._id = f"{peer.nonce if peer else 0:x}-{self._stream.id:x}"
        return self._id


def _resume_token(metadata: Body) -> Any:
    """The token as the handler gave it to `checkpoint`: it may hold small arrays, which metadata otherwise does not."""
    try:
        return decode(bytes(_raw_metadata(metadata)[RESUME]))
    except DecodeError:
        return None  # As for other invalid metadata.


def served_context(stream: Stream, metadata: Body) -> ServedContext:
    """The context of a request that came with metadata."""
    try:
        values = _metadata(metadata)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ServedContext(stream)  # Metadata is optional: invalid metadata does not make the request invalid.
    context = ServedContext(stream)
    name = values.pop(ID, None)
    if isinstance(name, str):
        context._id = name
    if values:
        _fill(context, values, metadata)
    return context


def _fill(context: ServedContext, values: dict[str, Any], metadata: Body) -> None:
    priority, travelling = values.pop(PRIORITY, 0), values.pop(TRAVELLING, None)
    if isinstance(priority, int):
        context.priority = max(LOWEST_PRIORITY, min(priority, HIGHEST_PRIORITY))
    if values.pop(RESUME, None) is not None:
        context.resume_token = _resume_token(metadata)
    if isinstance(travelling, dict):
        valid = {key: value for key, value in travelling.items() if isinstance(key, str) and key[:1] != "\0"}
        drop_invalid(valid)
        context.travelling = MappingProxyType(valid)
        # They came encoded, so they are plain values and need no check before they are sent on.
        context.carried = (context.travelling, b"")
    if values:
        context.metadata = MappingProxyType(values)
