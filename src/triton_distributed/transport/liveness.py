"""Sessions that say nothing while something is waited for.

A process that is stopped, or whose loop does not turn, keeps its connections: the kernel acknowledges what is sent and
even accepts new ones. Only an answered PING, or any other byte, shows that its loop turns. Silence ends no session: the
process may go on, and so do its streams then. It only counts as a sign to send calls elsewhere.

A host that is gone, or that cannot be reached, acknowledges nothing. Its sessions end, after a longer time: a network
that comes back within two thirds of it has cost nothing. `transport.host_loss` says how the two are distinguished.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Sized
from typing import Generic, Protocol, TypeVar

# Seconds without a byte after which a peer counts as silent, where no setting says otherwise.
HEALTH_S = 10.0
# Seconds without an acknowledgement after which a host counts as gone, where no setting says otherwise.
HOST_S = 30.0
# Sessions are checked so often within the timeout. The first check that finds nothing new sends a PING, the third
# reports the session as silent: by then three to four parts of the timeout have passed since the last byte. One PING is
# under way at a time, because a connection itself repeats what is lost.
CHECKS = 4
SILENT = CHECKS - 1


class Watched(Protocol):
    """What is watched: a session.

    Attributes:
        heard: something has come since the last check.
        missed_checks: how many checks found nothing new while something was waited for; below 0 while nothing is.
    """

    heard: bool
    missed_checks: int

    @property
    def streams(self) -> Sized:
        """The open streams: something is waited for while there are any."""

    def ping(self) -> object:
        """Ask for a sign of life."""

    def host_gone(self, timeout_s: float) -> bool:
        """Whether the peer's host has acknowledged nothing for so long although it had to."""

    def abandon(self, words: str) -> None:
        """The peer's host is gone: end at once."""


W = TypeVar("W", bound=Watched)


class Liveness(Generic[W]):
    """Watches the sessions of one pool or listener with one timer, which runs while there are any.

    Args:
        loop: the running loop.
        sessions: those that are open, at any time.
        timeout_s: seconds without a byte from the peer.
        host_s: seconds without an acknowledgement from the peer's host, after which its sessions end; less than
            `timeout_s` counts as that.
        on_silent: called with a session where something is waited for and the peer has said nothing for the timeout,
            once until it says something; None where peers are not asked, and only their hosts are watched.
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
        """A session was made: check the sessions from now on."""
        if self._timer is None:
            self._timer = self._loop.call_later(self._every_s, self._check)

    def stop(self) -> None:
        """Watch no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        assert self._timer is not None
        # Where this loop itself did not turn, it may not have read yet what came meanwhile.
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
        if not session.streams:  # counted downwards: silence until now says nothing about a stream that is opened later
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
