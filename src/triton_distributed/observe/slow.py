"""The log of slow calls and requests: one line each, with where the time went."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from triton_distributed.observe.log_context import trace_ids
from triton_distributed.observe.observer import (
    CallEnd,
    CallObserver,
    CallStart,
    Observer,
    RequestEnd,
    RequestObserver,
    RequestStart,
)
from triton_distributed.quiet import Quiet

logger = logging.getLogger("triton_distributed.slow")

QUIET_S = 1.0
"""Seconds between two entries for the calls, or the requests, of one endpoint."""


class SlowLog(Observer):
    """Logs each call and each request that took long, when it ends.

    Args:
        slow_s: seconds from which on it is logged.
    """

    def __init__(self, slow_s: float) -> None:
        self.slow_s = slow_s
        self._quiet = Quiet(QUIET_S)

    def call(self, start: CallStart) -> CallObserver | None:
        return _Call(self, start)

    def request(self, start: RequestStart) -> RequestObserver | None:
        return _Request(self, start)

    def log(
        self, what: str, endpoint: str, instance_id: int | None, end: CallEnd | RequestEnd, fields: Mapping[str, str]
    ) -> None:
        """Log the end of a call or a request if it was slow.

        Args:
            what: "call" or "request".
            endpoint, instance_id: the endpoint, and the instance that had the request; None if there was none.
            end: how it ended.
            fields: those of `LogContext` that are known; with `request_id`, empty if the request was never sent.
        """
        if end.timing.total_s < self.slow_s or (more := self._quiet.due((what, endpoint))) is None:
            return
        where = f"{endpoint}: slow {what} {fields['request_id'] or '(not sent)'}"
        if instance_id is not None:
            where += f", instance {instance_id}"
        left_out = f" ({more} more like it since the last line)" if more else ""
        # A call, or a request whose handler has not begun, ends in a callback: the log does not know its context there.
        known = {name: text for name, text in fields.items() if text}
        logger.warning("%s, %s: %s%s", where, end.outcome, end.timing, left_out, extra=known)


class _Call(CallObserver):
    def __init__(self, log: SlowLog, start: CallStart) -> None:
        self._log = log
        self._endpoint = start.endpoint
        self._trace = _trace(start.travelling)

    def ended(self, end: CallEnd) -> None:
        fields = {"request_id": end.request_id, **self._trace}
        self._log.log("call", self._endpoint, end.instance_id, end, fields)


class _Request(RequestObserver):
    def __init__(self, log: SlowLog, start: RequestStart) -> None:
        self._log = log
        self._start = start

    def ended(self, end: RequestEnd) -> None:
        endpoint, instance_id, context = self._start.endpoint, self._start.instance_id, self._start.context
        fields = {"request_id": context.id(), "endpoint": endpoint, "instance_id": str(instance_id)}
        self._log.log("request", endpoint, instance_id, end, fields | _trace(context.travelling))


def _trace(travelling: Mapping[str, Any]) -> dict[str, str]:
    ids = trace_ids(travelling.get("traceparent"))
    return {} if ids is None else ids._asdict()
