"""Frames: the header, the kinds, and the encoding of each frame.

A frame is a 14-byte little-endian header and a payload:

    payload length  u32    bytes after the header
    kind            u8     one of `Kind`
    flags           u8     `END`, `MORE`, `BUFFERS`, `ANNOTATED`, `CHECKPOINT`, `GRACEFUL`, `LENT`, `TIMES`
    stream          u64    the stream it belongs to; 0 for the session itself

The side that opens a stream gives it its id, ascending from 1. 64 bits never run out: at 100,000 calls a second they
last for millions of years, so no session ends for lack of ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from struct import Struct
from typing import Final

HEADER: Final = Struct("<IBBQ")
HEADER_BYTES: Final = 14
KIND_AT: Final = 4  # offset of the kind in a header
# A REQUEST's payload begins with: instance id, key of its endpoint, timeout in seconds (infinite if the call has no
# deadline), the window of its sender in bytes, bytes of metadata. It is packed together with the header.
REQUEST_HEADER: Final = Struct("<IBBQQQdII")
REQUEST_PREFIX: Final = Struct("<QQdII")
REQUEST_PREFIX_BYTES: Final = 32
UINT32: Final = Struct("<I")
UINT64: Final = Struct("<Q")
LOAD_ENTRY: Final = Struct("<QII")  # one endpoint in a LOAD

# The payload of one frame has at most this many bytes. Larger messages are cut, so a token waits for at most one frame.
MAX_FRAME: Final = 256 * 1024
# A frame that continues a message may have this many bytes, if the hello of its receiver allows it.
LARGE_FRAME: Final = 1024 * 1024
# One CREDIT gives at most this many bytes. Only a message above 4 GiB needs several.
MAX_CREDIT: Final = 2**32 - 1
# Before the hellos are exchanged, a payload may have at most this many bytes.
MAX_HELLO: Final = 4096
# One BATCH has at most this many items. A sender's turn ends after 256, see `wire.window`.
MOST_ITEMS: Final = 4096
# An item of at most this many bytes is sent whole, in one BATCH with its neighbours.
SMALL: Final = 64 * 1024


class Kind(IntEnum):
    """The kind of a frame."""

    HELLO = 1  # versions and limits; the first frame of each side
    REQUEST = 2  # opens a stream: fixed prefix, metadata, body
    DATA = 3  # one item
    BATCH = 4  # a msgpack array of items
    END = 5  # no more items from this side
    ERROR = 6  # the stream failed on this side: code, details
    CANCEL = 7  # this side has dropped the stream; with GRACEFUL it asks the handler to stop
    CREDIT = 8  # u32: further bytes the peer may send on the stream
    ACCEPT = 9  # u64 each: the streams whose handlers are about to begin; on a stream: see `StreamCore.ask_begun`
    REJECT = 10  # the request was refused before its handler began: code, text
    GOAWAY = 11  # open no more streams here: code, text
    PING = 12  # up to 64 bytes, which the PONG returns
    PONG = 13
    AUTH = 14  # proof that this end knows the token, and its real hello; see wire.authentication
    ASK = 15  # u64 each: the endpoints whose load the sender wants to know; only to a peer with the feature `load`
    LOAD = 16  # the load of such endpoints: u64 key, u32 running and u32 waiting requests, each
    MEMORY = 17  # about one segment of shared memory, see wire.shared; only to a peer with the feature `memory`


# The same kinds as plain numbers, which compiled code compares without an object.
HELLO: Final = 1
REQUEST: Final = 2
DATA: Final = 3
BATCH: Final = 4
END_OF_STREAM: Final = 5
ERROR: Final = 6
CANCEL: Final = 7
CREDIT: Final = 8
ACCEPT: Final = 9
REJECT: Final = 10
GOAWAY: Final = 11
PING: Final = 12
PONG: Final = 13
AUTH: Final = 14
ASK: Final = 15
LOAD: Final = 16
MEMORY: Final = 17

END: Final = 0x01  # the last frame of this side
MORE: Final = 0x02  # the message continues in the next frame of this stream
BUFFERS: Final = 0x04  # the message has buffers after its body
ANNOTATED: Final = 0x08  # the item is [data, event, comments, id]
CHECKPOINT: Final = 0x20  # each item is [token, item]: the token that resumes the stream after it, or nil
GRACEFUL: Final = 0x10  # on CANCEL: finish the current work and stop
LENT: Final = 0x40  # on the first frame of a message with BUFFERS: some of them lie in shared memory, see wire.assembly

TIMES: Final = 0x80  # on the last frame of an answer: its payload ends with `TIMES_BYTES`, see `StreamCore.times`
TIMES_BYTES: Final = 16


class ErrorCode(IntEnum):
    """Why a stream failed: the first byte of an ERROR."""

    HANDLER = 0  # the handler raised; `payload.exceptions` encodes the details
    INVALID = 1  # the request does not fit the handler
    DEADLINE = 2  # the call's deadline has passed
    CANCELLED = 4  # the worker ended the handler, e.g. at the end of a drain; 3 is free


class RejectCode(IntEnum):
    """Why a request was refused before its handler began: the first byte of a REJECT."""

    OVERLOADED = 0  # the details begin with a u32, see `overloaded`
    DRAINING = 1
    UNKNOWN = 2  # no such instance here: the client's record is stale
    PAUSED = 3  # the instance has paused the endpoint


class GoawayCode(IntEnum):
    """Why a session accepts no more streams: the first byte of a GOAWAY."""

    DRAINING = 0  # open streams go on
    PROTOCOL = 1  # the peer broke the protocol; the session is closed
    VERSION = 2  # the ends have no common version
    BUSY = 3  # too many sessions


def frame(kind: int, stream: int, payload: bytes = b"", flags: int = 0) -> bytes:
    """Return one frame as bytes."""
    return HEADER.pack(len(payload), kind, flags, stream) + payload


def coded(kind: int, stream: int, code: int, detail: bytes = b"") -> bytes:
    """Return an ERROR, REJECT or GOAWAY: a code byte and the detail, cut to the size of a frame."""
    return frame(kind, stream, bytes((code,)) + detail[: MAX_FRAME - 1])


def overloaded(words: str, retry_after_s: float = 0.0) -> bytes:
    """Return the details of a REJECT with OVERLOADED: u32 milliseconds until a retry makes sense (0: unknown), text."""
    return UINT32.pack(min(int(retry_after_s * 1000), 0xFFFFFFFF)) + words.encode()


def read_overloaded(detail: bytes) -> tuple[str, float]:
    """Read what `overloaded` wrote: the text, and seconds until a retry makes sense."""
    if len(detail) < UINT32.size:
        return detail.decode("utf-8", "replace"), 0.0
    return detail[UINT32.size :].decode("utf-8", "replace"), UINT32.unpack_from(detail)[0] / 1000


def request_prefix(instance_id: int, endpoint_key: int, timeout_s: float, window: int, metadata: bytes) -> bytes:
    """Return the start of a REQUEST's payload, up to its body."""
    return REQUEST_PREFIX.pack(instance_id, endpoint_key, timeout_s, window, len(metadata)) + metadata


def array_length(payload: bytes | bytearray | memoryview) -> int:
    """Return the number of elements that a msgpack array declares; 0 for any other value."""
    first = payload[0] if len(payload) else 0
    if first & 0xF0 == 0x90:
        return first & 0x0F
    size = {0xDC: 2, 0xDD: 4}.get(first, 0)
    return int.from_bytes(payload[1 : 1 + size], "big")


def array_of(items: Sequence[bytes]) -> bytes:
    """Return a msgpack array of elements that are already encoded (msgpack specification, array format family)."""
    n = len(items)
    if n < 16:
        head = bytes((0x90 | n,))
    elif n < 65536:
        head = b"\xdc" + n.to_bytes(2, "big")
    else:
        head = b"\xdd" + n.to_bytes(4, "big")
    return head + b"".join(items)
