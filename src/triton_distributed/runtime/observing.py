"""The observers of one runtime: those that the settings name, and those that the program adds."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from triton_distributed.calling.conditions import Conditions
from triton_distributed.config import Config
from triton_distributed.context import Context
from triton_distributed.names import EndpointName
from triton_distributed.observe.observer import CallStart, Observers
from triton_distributed.observe.slow import SlowLog
from triton_distributed.observe.traces import Traces
from triton_distributed.runtime.metadata import sent, travelling_of

logger = logging.getLogger("triton_distributed.runtime")


class Observing(Observers):
    """The observers of one runtime.

    Args:
        config: the settings: `TRD_SLOW_S` and `TRD_TRACES`.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._looks = config.traces
        self._full_tracebacks = config.full_tracebacks
        if config.slow_s:
            self.add(SlowLog(config.slow_s))

    def look(self) -> None:
        """Make spans from now on if the program has configured OpenTelemetry's SDK. It is not imported for that.

        This runs when an endpoint is served and when a client is made: a program may configure the SDK later than it
        makes its runtime.
        """
        if self._looks and _is_configured(sys.modules.get("opentelemetry.trace")):
            self._looks = False
            if not any(isinstance(each, Traces) for each in self.present):
                try:
                    self.add(Traces(full_tracebacks=self._full_tracebacks))
                except Exception as error:  # E.g. OTEL_PROPAGATORS names one that is not installed.
                    logger.warning("there are no spans: OpenTelemetry cannot be used: %s", error)


def _is_configured(api: Any) -> bool:
    """Whether there is a provider of tracers that makes spans."""
    if api is None or not hasattr(api, "get_tracer_provider"):  # Another thread may be importing it now.
        return False
    return not isinstance(api.get_tracer_provider(), (api.ProxyTracerProvider, api.NoOpTracerProvider))


def observed(
    observers: Observers,
    name: EndpointName,
    unary: bool,
    hedge: bool,
    options: Mapping[str, Any],
    serving: Context | None,
    conditions: Conditions,
) -> Conditions:
    """Tell the observers that a call begins, and return its conditions, with what observers let travel with it.

    Args:
        observers: the observers of the runtime; there are some.
        name: the endpoint that is called.
        unary, hedge: see `CallStart`.
        options: the options of the call.
        serving: the context of the request whose handler makes the call; None outside of handlers.
        conditions: the conditions without observers.
    """
    context = options.get("context")
    call = observers.call(CallStart(str(name), unary, hedge, travelling_of(context, serving)))
    if call is None:
        return conditions
    data = conditions.metadata
    if added := call.travelling:
        priority = options.get("priority")
        if priority is None and serving is not None:
            priority = serving.priority
        # There may be no room left for them, or a user's observer may give values that cannot travel.
        again = observers.safely(sent, context, options.get("metadata"), priority, serving, added)
        data = data if again is None else again
    return Conditions(
        conditions.context, conditions.timeout_s, data, conditions.idempotent, conditions.resume, observed=call
    )
