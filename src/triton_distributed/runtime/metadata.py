"""The metadata that a call sends: its own, and what it inherits from the request whose handler makes it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from triton_distributed.context import HIGHEST_PRIORITY, ID, LOWEST_PRIORITY, PRIORITY, TRAVELLING, Context
from triton_distributed.payload.codec import encode
from triton_distributed.wire.frames import SMALL

_encode = msgspec.msgpack.Encoder().encode
_NONE: Mapping[str, Any] = MappingProxyType({})


def inherited(serving: Context) -> bytes:
    """The metadata of a call that a handler makes without options, encoded: once, as long as nothing is added.

    Args:
        serving: the context of the handler's request.

    Raises:
        TypeError, ValueError: as `sent`, for values that the handler passed to `context.travel`.
    """
    carried, travelling = serving.carried, serving.travelling
    known = carried is not None and carried[0] is travelling
    if carried is None or not known or not carried[1]:
        if known or not travelling:  # What came with the request can be sent on: no check is needed.
            data = _encode(_internal(travelling, serving.id(), serving.priority))
        else:
            data = _encoded({}, travelling, serving.id(), serving.priority)
        carried = serving.carried = (travelling, data)
    return carried[1]


def sent(
    context: Context | None,
    metadata: Mapping[str, Any] | None,
    priority: int | None,
    serving: Context | None,
    added: Mapping[str, Any] = _NONE,
) -> bytes:
    """The metadata of a call, encoded.

    Args:
        context, metadata, priority: the options of the call.
        serving: the context of the request whose handler makes the call; None outside of handlers.
        added: further values that travel; they replace others of the same name.

    Raises:
        TypeError: the context or the metadata is of another type, or a value cannot be encoded.
        ValueError: the metadata is too large, or the priority is out of range.
    """
    values, travelling = _values(context, metadata, serving)
    if added:
        travelling = {**travelling, **added}
    named = context or serving
    return _encoded(values, travelling, None if named is None else named.id(), priority)


def visible(context: Context | None, metadata: Mapping[str, Any] | None, serving: Context | None) -> Mapping[str, Any]:
    """The metadata of a call as its policy sees it, the travelling values included. The call's own values come first.

    Raises:
        TypeError: the context or the metadata is of another type.
    """
    values, travelling = _values(context, metadata, serving)
    return MappingProxyType({**travelling, **values})


def travelling_of(context: Context | None, serving: Context | None) -> Mapping[str, Any]:
    """The values that travel with a call, for those who observe it."""
    return _values(context, None, serving)[1]


def _values(
    context: Context | None, metadata: Mapping[str, Any] | None, serving: Context | None
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The values for the called handler, and those that travel further."""
    if context is not None and not isinstance(context, Context):
        raise TypeError(f"context={context!r}: must be a Context, e.g. Context(id=…)")
    if metadata and not isinstance(metadata, Mapping):
        raise TypeError(f"metadata={metadata!r}: must be a mapping of plain values by name")
    values = {**(_NONE if context is None else context.metadata), **(metadata or _NONE)}
    travelling = _NONE if serving is None else serving.travelling
    if context is not None and context is not serving and context.travelling:
        travelling = {**travelling, **context.travelling}
    return values, travelling


def _internal(travelling: Mapping[str, Any], name: str | None, priority: int | None) -> dict[str, Any]:
    """The values that the runtime itself adds."""
    found: dict[str, Any] = {}
    if name is not None:
        found[ID] = name
    if priority:
        found[PRIORITY] = priority
    if travelling:
        found[TRAVELLING] = dict(travelling)
    return found


def _encoded(values: Mapping[Any, Any], travelling: Mapping[Any, Any], name: str | None, priority: int | None) -> bytes:
    for label, mapping in (("metadata", values), ("travelling", travelling)):
        for key in mapping:
            if not isinstance(key, str) or key[:1] == "\0":
                raise TypeError(f"{label} has the key {key!r}: keys are text that does not begin with a NUL")
    if priority and not LOWEST_PRIORITY <= priority <= HIGHEST_PRIORITY:
        raise ValueError(f"priority={priority!r}: must be from {LOWEST_PRIORITY} to {HIGHEST_PRIORITY}")
    try:
        data = encode({**values, **_internal(travelling, name, priority)}, "metadata")
    except TypeError:
        encode(dict(travelling), "travelling")  # If one of these is the cause, the error names its path.
        raise
    if not isinstance(data, bytes) or len(data) > SMALL:
        raise ValueError(
            f"metadata and travelling values may have at most {SMALL:,} bytes: larger values belong in the request"
        )
    return data
