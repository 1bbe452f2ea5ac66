"""The messages of etcd's JSON gateway: int64 as text, bytes in base64, zero and empty fields left out."""

from __future__ import annotations

from typing import Any

import msgspec

Operation = dict[str, Any]


class Header(msgspec.Struct, frozen=True):
    """The header of every reply: the store's revision when the reply was made."""

    revision: int = 0


class KeyValue(msgspec.Struct, frozen=True):
    """One key. `mod_revision` is the store's revision at its last change."""

    key: bytes = b""
    value: bytes = b""
    mod_revision: int = 0
    lease: int = 0


class RangeReply(msgspec.Struct, frozen=True):
    """Keys in order; `more` means that the limit left some out."""

    header: Header = Header()
    kvs: tuple[KeyValue, ...] = ()
    more: bool = False


class _Response(msgspec.Struct, frozen=True):
    response_range: RangeReply = RangeReply()


class TxnReply(msgspec.Struct, frozen=True):
    """The result of a transaction: whether the comparisons held, and the replies of the chosen operations."""

    header: Header = Header()
    succeeded: bool = False
    responses: tuple[_Response, ...] = ()


class LeaseReply(msgspec.Struct, frozen=True):
    """A lease; TTL in seconds, 0 or less if it does not exist. `keys` only if they were requested."""

    id: int = msgspec.field(name="ID", default=0)
    ttl: int = msgspec.field(name="TTL", default=0)
    keys: tuple[bytes, ...] = ()


class KeepAliveReply(msgspec.Struct, frozen=True):
    result: LeaseReply = LeaseReply()


class TokenReply(msgspec.Struct, frozen=True):
    token: str = ""


class Nothing(msgspec.Struct, frozen=True):
    """A reply whose contents do not matter."""


class ErrorReply(msgspec.Struct, frozen=True):
    """The reason for a refusal. `code` is gRPC's."""

    code: int = 0
    message: str = ""
    error: str = ""
    grpc_code: int = 0  # used instead of `code` if a stream ends with an error


class Event(msgspec.Struct, frozen=True):
    kv: KeyValue
    type: str = "PUT"


class WatchReply(msgspec.Struct, frozen=True):
    """One message of a watch. `fragment`: more events of the same revision may follow."""

    header: Header = Header()
    created: bool = False
    canceled: bool = False
    cancel_reason: str = ""
    compact_revision: int = 0
    fragment: bool = False
    events: tuple[Event, ...] = ()


class WatchLine(msgspec.Struct, frozen=True):
    result: WatchReply | None = None
    error: ErrorReply | None = None


def put(key: bytes, value: bytes, lease: int = 0) -> Operation:
    """Write a key, attached to a lease if one is given."""
    return {"request_put": {"key": key, "value": value, "lease": lease}}


def delete(key: bytes) -> Operation:
    """Delete one key."""
    return {"request_delete_range": {"key": key}}


def get(key: bytes, end: bytes = b"", *, limit: int = 0, revision: int = 0) -> Operation:
    """Read one key, or all keys from `key` up to `end`, at a revision (0: now)."""
    return {"request_range": {"key": key, "range_end": end, "limit": limit, "revision": revision}}


def is_absent(key: bytes) -> Operation:
    """Compare: the key does not exist."""
    return {"key": key, "target": "CREATE", "result": "EQUAL", "create_revision": 0}


def has_lease(key: bytes, lease: int) -> Operation:
    """Compare: the key exists and is attached to this lease."""
    return {"key": key, "target": "LEASE", "result": "EQUAL", "lease": lease}


def past(prefix: bytes) -> bytes:
    """Return the end of the range of all keys that begin with `prefix`, which must not end in 0xff."""
    return prefix[:-1] + bytes((prefix[-1] + 1,))
