"""The log of slow calls and requests: one line each, with where the time went."""

from __future__ import annotations

import logging

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
        self.quiet = Quiet(QUIET_S)

    def call(self, start: CallStart) -> CallObserver | None:
        return _Call(self, start.endpoint)

    def request(self, start: RequestStart) -> RequestObserver | None:
        return _Request(self, start)

    def log(
        self, what: str, endpoint: str, instance_id: int | None, request_id: str, end: CallEnd | RequestEnd
    ) -> None:
        """Log the end of a call or a request if it was slow."""
        if end.timing.total_s < self.slow_s or (more := self.quiet.due((what, endpoint))) is None:
            return
        where = f"{endpoint}: slow {what} {request_id or '(not sent)'}"
        if instance_id is not None:
            where += f", instance {instance_id}"
        left_out = f" ({more} more like it since the last line)" if more else ""
        logger.warning("%s, %s: %s%s", where, end.outcome, end.timing, left_out)


class _Call(CallObserver):
    def __init__(self, log: SlowLog, endpoint: str) -> None:
        self._log = log
        self._endpoint = endpoint

    def ended(self, end: CallEnd) -> None:
        self._log.log("call", self._endpoint, end.instance_id, end.request_id, end)


class _Request(RequestObserver):
    def __init__(self, log: SlowLog, start: RequestStart) -> None:
        self._log = log
        self._start = start

    def ended(self, end: RequestEnd) -> None:
        start = self._start
        self._log.log("request", start.endpoint, start.instance_id, start.context.id(), end)
