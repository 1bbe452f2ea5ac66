"""Detects silent sessions: those with open streams from which nothing arrives.

A process that is stopped, or whose loop does not turn, keeps its connections: the kernel acknowledges data that is
sent, and even accepts new connections. Only an answered PING, or any other byte, shows that its loop turns. Silence
does not end a session, since the process and its streams may go on. It is only a reason to send calls to other
workers.

A host that is down or unreachable acknowledges nothing. Its sessions end after a longer time; a network that returns
within two thirds of that time costs nothing. `transport.host_loss` distinguishes the two cases.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Sized
from typing import Generic, Protocol, TypeVar

# Sessions are checked this many times within the timeout. The first check that finds nothing new sends a PING, the
# third reports the session as silent: by then three to four quarters of the timeout have passed since the last byte.
# Only one PING is under way at a time, because a connection itself repeats lost data.
CHECKS = 4
SILENT = CHECKS - 1


class Watched(Protocol):
    """A session that is watched.

    Attributes:
        heard: something has arrived since the last check.
        missed_checks: checks in a row that found nothing new while streams were open; negative without streams.
    """

    heard: bool
    missed_checks: int

    @property
    def streams(self) -> Sized:
        """The open streams. A session without streams is not silent."""

    def ping(self) -> object:
        """Send a PING."""

    def host_gone(self, timeout_s: float) -> bool:
        """Return whether the peer's host has acknowledged nothing for this long, although it had to."""

    def abandon(self, words: str) -> None:
        """End the session at once, because the peer's host is gone."""


W = TypeVar("W", bound=Watched)


class Liveness(Generic[W]):
    """Watches the sessions of one pool or listener with one timer, which runs while there are sessions.

    Args:
        loop: the running loop.
        sessions: returns the sessions that are open now.
        timeout_s: seconds without a byte after which a session is silent: `TRD_HEALTH_TIMEOUT_S`.
        host_s: seconds without an acknowledgement from the peer's host after which its sessions end, at least
            `timeout_s`: `TRD_HOST_TIMEOUT_S`.
        on_silent: called with a session that fell silent, once until something arrives; None to send no PINGs and
            watch only hosts.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sessions: Callable[[], Iterable[W]],
        timeout_s: float,
        host_s: float,
        on_silent: Callable[[W], None] | None,
    ) -> None:
        self._loop = loop
        self._sessions = sessions
        self._every_s = timeout_s / CHECKS
        self._host_s = max(timeout_s, host_s)
        self._host_checks = math.ceil(self._host_s / self._every_s)
        self._on_silent = on_silent
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start to check the sessions, after one was made."""
        if self._timer is None:
            self._timer = self._loop.call_later(self._every_s, self._check)

    def stop(self) -> None:
        """Stop watching."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        assert self._timer is not None
        # If this loop itself did not turn, it may not have read yet what arrived meanwhile.
        late = self._loop.time() - self._timer.when() > self._every_s / 2
        self._timer = None
        sessions = tuple(self._sessions())
        for session in sessions:
            if session.heard:
                session.heard, session.missed_checks = False, 0 if session.streams else -1
            elif not late:
                self._unheard(session)
        if sessions:
            self.start()

    def _unheard(self, session: W) -> None:
        if not session.streams:  # counts down: silence so far says nothing about a stream that opens later
            session.missed_checks = min(session.missed_checks, 0) - 1
            if session.missed_checks < -self._host_checks:
                session.missed_checks = -1
                self._end_if_gone(session)
            return
        session.missed_checks = max(session.missed_checks, -1) + 1
        if session.missed_checks > 0 and self._on_silent is not None:
            session.ping()
            if session.missed_checks == SILENT:
                self._on_silent(session)
        if session.missed_checks >= self._host_checks:
            self._end_if_gone(session)

    def _end_if_gone(self, session: W) -> None:
        if session.host_gone(self._host_s):
            session.abandon(f"its host acknowledged nothing for {self._host_s:g} s, see TRD_HOST_TIMEOUT_S")
