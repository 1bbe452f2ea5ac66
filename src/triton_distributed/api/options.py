"""The options of native calls and of served endpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from triton_distributed.context import Context
from triton_distributed.routing.policies import Policy


class SharedOptions(TypedDict, total=False):
    """The options of every call."""

    timeout: float | None
    """Seconds for the whole call. A call within a handler inherits the handler's remaining time, if less."""
    policy: str | Policy | None
    """Chooses the instance: `round_robin` (the default), `random`, `least_loaded`, `p2c`, or a function."""
    metadata: Mapping[str, Any] | None
    """Plain values by name; the handler finds them in `context.metadata`."""
    priority: int | None
    """-128 to 127. Among waiting requests, those with a larger priority are admitted first."""
    idempotent: bool
    """A second handler may run the request without harm, so it may move after a handler has begun."""
    context: Context | None
    """Controls the call: its id and metadata are sent, and its `stop_generating()` and `kill()` reach the handler."""


class CallOptions(SharedOptions, total=False):
    """The options of `call`."""

    hedge_after_s: float | None
    """Seconds without an answer after which a second instance also gets the request. It needs `idempotent=True`."""


class StreamOptions(SharedOptions, total=False):
    """The options of `stream`."""

    resume: bool
    """If the instance is lost, another one continues after the handler's last `context.checkpoint`."""


class ServeOptions(TypedDict, total=False):
    """The options of a served endpoint."""

    max_inflight: int | None
    """The most handlers that run at once; None for no limit."""
    max_queue: int
    """The most requests that wait beyond that. The next is refused with Overloaded. 0 by default."""
    metadata: Mapping[str, Any] | None
    """Plain JSON values to publish with the instance."""
    graceful_shutdown: bool
    """True (the default) lets running requests finish at shutdown, False cancels them."""
