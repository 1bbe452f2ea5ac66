"""The options of native calls and of served endpoints."""

from __future__ import annotations

from collections.abc import Mapping

from triton_distributed.routing.policies import MetadataPolicy, Policy
from triton_distributed.runtime import options
from triton_distributed.runtime.options import RequestOptions


class UnaryOptions(RequestOptions, total=False):
    """The options of `call`, as keyword arguments: `here.call(CONTRACT, request, timeout=2)`."""

    policy: str | Policy | MetadataPolicy | None
    """Chooses the instance: `round_robin` (the default), `random`, `least_loaded`, `p2c`, or a function."""

    hedge_after_s: float | None
    """Seconds without an answer after which a second instance also gets the request. The first answer counts, and the
    other handler is cancelled. It needs `idempotent=True`."""


class StreamOptions(RequestOptions, total=False):
    """The options of `stream`, as keyword arguments: `here.stream(CONTRACT, request, resume=True)`."""

    policy: str | Policy | MetadataPolicy | None
    """Chooses the instance: `round_robin` (the default), `random`, `least_loaded`, `p2c`, or a function."""

    resume: bool
    """If the instance is lost in the middle of the stream, another continues after the last item for which the handler
    gave a token (`context.checkpoint`), and the caller sees one sequence."""


class ServeOptions(options.ServeOptions, total=False):
    """The options of a served endpoint, as keyword arguments: `@trd.serve(CONTRACT, max_inflight=64)`."""

    graceful_shutdown: bool
    """True (the default) lets running requests finish at shutdown, False cancels them."""

    metrics_labels: Mapping[str, str] | None
    """Labels to add to the metrics of the endpoint, at most 8: `{"model": "llama"}`."""
