"""The record of an instance: one small JSON object, stored under a key."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import replace
from typing import Any

import msgspec

from triton_distributed.errors import InvalidName
from triton_distributed.names import EndpointName, Instance

MAX_RECORD_BYTES = 64 * 1024
"""Largest record that a reader accepts, in bytes. Addresses and metadata usually need a few hundred bytes."""

SUFFIX = ".json"

_VERSION = 1

_SLUG_CHARACTERS = 96
"""Most characters of a slug. With hash, id and suffix a key has at most 135 bytes; eCryptfs allows 143, others 255."""

_NOT_SLUG = re.compile(r"[^A-Za-z0-9_-]+")
_KEY = re.compile(r"(?P<prefix>[A-Za-z0-9_.-]+\.[0-9a-f]{16})\.(?P<id>[0-9a-f]{16})\.json")


class BadRecord(ValueError):
    """A record cannot be written, or the data read is not a valid record."""


class _Record(msgspec.Struct):
    version: int
    namespace: str
    component: str
    endpoint: str
    id: int
    addresses: tuple[str, ...]
    host: str = ""
    metadata: dict[str, Any] = {}
    busy: bool | msgspec.UnsetType = msgspec.UNSET  # Written only if it is true, which is rare.
    contract: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET  # The schema of a native endpoint's contract.
    status_url: str | msgspec.UnsetType = msgspec.UNSET  # Written only if the worker has a status port.
    pid: int = 0  # With `since` only for people: no code decides by them.
    since: float | msgspec.UnsetType = msgspec.UNSET


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(_Record)


def encode(instance: Instance, pid: int = 0) -> bytes:
    """Encode an instance as a record.

    Raises:
        BadRecord: its metadata is not plain JSON (a tuple becomes a list), or the record exceeds `MAX_RECORD_BYTES`.
    """
    name = instance.endpoint
    record = _Record(
        version=_VERSION,
        namespace=name.namespace,
        component=name.component,
        endpoint=name.endpoint,
        id=instance.id,
        addresses=instance.addresses,
        host=instance.host,
        metadata=dict(instance.metadata),
        busy=instance.busy or msgspec.UNSET,
        contract=msgspec.UNSET if instance.contract is None else dict(instance.contract),
        status_url=instance.status_url or msgspec.UNSET,
        pid=pid or instance.pid,
        since=instance.since or msgspec.UNSET,
    )
    try:
        _check_plain(record.metadata, "metadata")
        data = _encoder.encode(record)
    except BadRecord:
        raise
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise BadRecord(f"metadata must be plain JSON values: {error}") from error
    if len(data) > MAX_RECORD_BYTES:
        raise BadRecord(f"the record has {len(data):,} bytes, above the limit of {MAX_RECORD_BYTES:,}: less metadata")
    return data


def _check_plain(value: object, path: str) -> None:
    """Refuse values that the encoder would silently convert: bytes to base64 text, NaN to null."""
    if isinstance(value, dict):
        for name, each in value.items():
            if not isinstance(name, str):
                raise BadRecord(f"metadata must be plain JSON values: {path} has the key {name!r}, which is not text")
            _check_plain(each, f"{path}.{name}")
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            _check_plain(each, f"{path}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise BadRecord(f"metadata must be plain JSON values: {path} is {value!r}")
    elif not isinstance(value, str | int | float | None):
        raise BadRecord(f"metadata must be plain JSON values: {path} is of type {type(value).__name__}")


def decode(data: bytes) -> Instance:
    """Decode a record that `encode` wrote. Unknown fields, e.g. of a later version, are ignored.

    Raises:
        BadRecord: the data is not a valid record.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise BadRecord(f"it is above the limit of {MAX_RECORD_BYTES:,} bytes")
    try:
        record = _decoder.decode(data)
        if record.version != _VERSION:
            raise BadRecord(f"it has version {record.version}, and this program reads version {_VERSION}")
        endpoint = EndpointName(record.namespace, record.component, record.endpoint)
        contract = None if record.contract is msgspec.UNSET else record.contract
        since = 0.0 if record.since is msgspec.UNSET else record.since
        return Instance(
            endpoint,
            record.id,
            record.addresses,
            record.host,
            record.metadata,
            record.busy is True,
            contract,
            "" if record.status_url is msgspec.UNSET else record.status_url,
            record.pid,
            since,
        )
    except (msgspec.DecodeError, InvalidName, UnicodeDecodeError, RecursionError) as error:
        raise BadRecord(str(error)) from error


def marked(data: bytes, busy: bool, pid: int = 0) -> bytes:
    """Return a record that `encode` wrote with its busy state changed."""
    return encode(replace(decode(data), busy=busy), pid)


def prefix(endpoint: EndpointName) -> str:
    """The prefix of the keys of an endpoint's instances, unique to the endpoint: a readable part, then a hash."""
    parts = (endpoint.namespace, endpoint.component, endpoint.endpoint)
    readable = ".".join(_NOT_SLUG.sub("_", part) for part in parts)[:_SLUG_CHARACTERS].strip(".") or "_"
    # NUL is a control character, which names cannot contain, so two different triples never give the same text.
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
    return f"{readable}.{digest}"


def key(endpoint: EndpointName, instance_id: int) -> str:
    """The key of a record, also its file name: valid for any endpoint's name, at most 135 bytes."""
    return f"{prefix(endpoint)}.{instance_id:016x}{SUFFIX}"


def prefix_of(key: str) -> str | None:
    """The endpoint's prefix in a key; None if the text is not a key."""
    found = _KEY.fullmatch(key)
    return found["prefix"] if found else None
