"""From the options of a call to its conditions: checks them, and adds what the call inherits in a handler."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from triton_distributed.calling.conditions import Conditions
from triton_distributed.context import Context
from triton_distributed.runtime.metadata import inherited, sent
from triton_distributed.runtime.options import CallOptions, unexpected

_NAMES = frozenset(CallOptions.__annotations__)
_PARAMETERS = {
    "Client.call": ("policy", "hedge_after_s"),
    "Connection.call": ("policy", "hedge_after_s"),
    "Connection.stream": ("policy",),
    "Connection.send": ("policy",),
    "Client.random": ("annotated",),
    "Client.round_robin": ("annotated",),
    "Client.direct": ("annotated",),
}
"""The options of public methods besides `CallOptions`; of the others, they are `policy` and `annotated`."""


def conditions_of(
    operation: str, options: Mapping[str, Any], serving: Context | None, loop: asyncio.AbstractEventLoop
) -> Conditions:
    """The conditions of a call.

    Args:
        operation: the name of the public method, for the error about an unknown option.
        options: the options, as the caller gave them.
        serving: the context of the request whose handler makes the call; None outside of handlers, and for a call that
            does not depend on the request.
        loop: the running loop.

    Raises:
        TypeError, ValueError: an option is unknown or invalid.
    """
    for name in options:
        if name not in _NAMES:
            known = {*_NAMES, *_PARAMETERS.get(operation, ("policy", "annotated"))}
            plain = operation == "Client.call" and name == "annotated"
            raise unexpected(operation, [name], known, "call() always returns the plain value" if plain else "")
    context, metadata, timeout = options.get("context"), options.get("metadata"), options.get("timeout")
    priority = options.get("priority")
    if timeout is not None:
        timeout = seconds(timeout)
    if priority is not None and type(priority) is not int:
        raise TypeError(f"priority={priority!r}: must be a whole number")
    if serving is None:
        extra = sent(context, metadata, priority, None) if context is not None or metadata or priority else b""
    else:
        if context is None and not metadata and priority is None:
            extra = inherited(serving)
        else:
            extra = sent(context, metadata, serving.priority if priority is None else priority, serving)
        if context is None:
            context = serving
        if serving.calls_deadline is not None:
            left = max(0.0, serving.calls_deadline - loop.time())
            timeout = left if timeout is None or left < timeout else timeout
    return Conditions(context, timeout, extra, options.get("idempotent", False), options.get("resume", False))


def seconds(timeout: object, name: str = "timeout", none: str = "no limit") -> float:
    """A call's timeout, checked. A value at or below 0 is valid and has expired: remaining time may be such a value.

    Raises:
        ValueError: it is not a number; the text names it `name`, and says what None means: `none`.
    """
    if not isinstance(timeout, (int, float)) or timeout != timeout:
        raise ValueError(f"{name}={timeout!r}: must be a number of seconds, or None for {none}")
    return timeout
