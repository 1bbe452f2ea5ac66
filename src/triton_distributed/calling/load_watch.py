"""The loads that the workers of one endpoint report: asked for while something in this process uses them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from triton_distributed.discovery.table import EndpointTable
from triton_distributed.routing.load import LoadBook
from triton_distributed.transport.session import Session

RENEW_S = 10.0
"""Seconds after which workers are asked again, if a report was used meanwhile. A worker reports for 30 s after it was
asked, so one lost chance to ask does no harm."""


class LoadWatch:
    """Asks workers for their load, on sessions that exist, and puts what they report into the book.

    Nothing is asked before the first use. A session that is new since then is asked at the first use that finds no
    report.

    Args:
        key: the endpoint's key.
        loop: the running loop.
        book: gets the reports; its `want` is set to this object's.
        table: the endpoint's instances.
        session: returns the live session to some addresses, or None.
    """

    def __init__(
        self,
        key: int,
        loop: asyncio.AbstractEventLoop,
        book: LoadBook,
        table: EndpointTable,
        session: Callable[[tuple[str, ...]], Session | None],
    ) -> None:
        self._key = key
        self._loop = loop
        self._book = book
        self._table = table
        self._session = session
        self._asked: dict[int, Session] = {}  # By instance; bounded by the table.
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        book.want = self.want

    def want(self, instance_id: int) -> None:
        """Ask the worker of an instance for its load, if it is connected and was not asked yet."""
        instance = self._table.by_id.get(instance_id)
        session = None if instance is None else self._session(instance.addresses)
        if session is None or self._asked.get(instance_id) is session or self._closed:
            return
        self._ask(instance_id, session)
        if self._timer is None:
            self._timer = self._loop.call_later(RENEW_S, self._renew)

    def _ask(self, instance_id: int, session: Session) -> None:
        self._asked[instance_id] = session

        def heard(running: int, waiting: int) -> None:
            if self._asked.get(instance_id) is session:
                self._book.note_report(instance_id, running, waiting)

        session.connection.ask_load(self._key, heard)

    def _renew(self) -> None:
        """Ask again, or stop if no report was used since the last time. Workers then stop by themselves."""
        self._timer = None
        if not self._book.used:
            for instance_id in list(self._asked):
                self.forget(instance_id)
            return
        self._book.used = False
        for instance_id, session in list(self._asked.items()):
            if session.lost is None:
                self._ask(instance_id, session)
        self._timer = self._loop.call_later(RENEW_S, self._renew)

    def forget(self, instance_id: int) -> None:
        """Forget the reports of an instance: it is gone, lost or silent. The next use asks again."""
        if self._asked.pop(instance_id, None) is not None:
            self._book.forget_report(instance_id)

    def close(self) -> None:
        """Ask no more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._asked.clear()
