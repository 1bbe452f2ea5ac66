"""Reports of the load of a worker's endpoints, to the clients that have asked.

The load is looked at by a timer, and only while a client wants to know it, so that a request costs nothing more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sized
from typing import Any, Protocol

from triton_distributed.wire.connection import Connection

REPORT_S = 0.1
"""Seconds between two reports of one endpoint to one client, while its load changes."""

STEADY_S = 1.0
"""Seconds after which a load that does not change is reported again, so that the age of a report says something."""

ASKED_S = 30.0
"""Seconds for which an ASK is good. A client that is still interested asks again every `RENEW_S`, see
`calling.load_watch`. One that is not interested any more need not say so."""

MOST_PER_S = 1000.0
"""Reports per second that a worker sends at most: with more clients, each gets fewer. They take about 1 % of a core."""

MOST_WAITING = 128
"""While more frames than this wait to be written to a client, it gets no reports: it would read old ones."""


class _Gate(Protocol):
    @property
    def running(self) -> Sized: ...

    @property
    def queue(self) -> Sized: ...


class Loaded(Protocol):
    """The part of an endpoint that is reported; see `serving.endpoint.ServedEndpoint`."""

    @property
    def gate(self) -> _Gate: ...


class _Report:
    """What one client knows of one endpoint.

    Attributes:
        until: when its interest ends.
        sent: when the last report was sent, on the loop's clock.
        load: the running and the waiting requests in that report.
    """

    __slots__ = ("load", "sent", "until")

    def __init__(self) -> None:
        self.until = 0.0
        self.sent = float("-inf")
        self.load = (0, 0)


class LoadReports:
    """Reports the load of the endpoints of one worker.

    The table is bounded by the sessions times the served endpoints.

    Args:
        loop: the running loop.
        endpoints: a live view of the served endpoints by key.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, endpoints: Mapping[int, Loaded]) -> None:
        self._loop = loop
        self._endpoints = endpoints
        self._clients: dict[Connection[Any], dict[int, _Report]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def asked(self, connection: Connection[Any], keys: Iterable[int]) -> None:
        """Report the load of these endpoints for the next `ASKED_S` seconds, and now if the client has no report yet.

        Args:
            connection: the connection to the client.
            keys: keys of endpoints. Those that are not served here are ignored.
        """
        served = [key for key in keys if key in self._endpoints]
        if not served or self._closed:
            return
        now = self._loop.time()
        reports = self._clients.setdefault(connection, {})
        for key in served:
            reports.setdefault(key, _Report()).until = now + ASKED_S
        self._report(connection, reports, now)
        if self._timer is None:
            self._timer = self._loop.call_later(REPORT_S, self._look)

    def _look(self) -> None:
        now, count = self._loop.time(), 0
        for connection, reports in list(self._clients.items()):
            self._report(connection, reports, now)
            if connection.lost or not reports:
                del self._clients[connection]
            count += len(reports)
        pause = max(REPORT_S, count / MOST_PER_S)
        self._timer = self._loop.call_later(pause, self._look) if self._clients else None

    def _report(self, connection: Connection[Any], reports: dict[int, _Report], now: float) -> None:
        if connection.lost or len(connection.out) > MOST_WAITING:
            return
        due = []
        for key, report in list(reports.items()):
            endpoint = self._endpoints.get(key)
            if endpoint is None or now > report.until:
                del reports[key]
                continue
            load = (len(endpoint.gate.running), len(endpoint.gate.queue))
            # A timer may be early by the clock's resolution.
            if now - report.sent >= (STEADY_S if load == report.load else REPORT_S) - 0.001:
                report.load, report.sent = load, now
                due.append((key, *load))
        if due:
            connection.report_load(due)

    def close(self) -> None:
        """Stop reporting."""
        self._closed = True
        self._clients.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
