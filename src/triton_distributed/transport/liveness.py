"""Sessions that say nothing while something is waited for.

A process that is stopped, or whose loop does not turn, keeps its connections: the kernel acknowledges what is sent and
even accepts new ones. Only an answered PING, or any other byte, shows that its loop turns. Silence ends no session: the
process may go on, and so do its streams then. It only counts as a sign to send calls elsewhere.

A host that is gone, or that cannot be reached, acknowledges nothing. Its sessions end, after a longer time: a network
that comes back within two thirds of it has cost nothing. `transport.host_loss` says how the two are told apart.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Sized
from typing import Generic, Protocol, TypeVar

HEALTH_S = 10.0
HOST_S = 30.0
# Looks within the timeout. The first that finds nothing new sends a PING, the third says that the session is silent:
# by then three to four parts of the timeout have passed since the last byte. One PING is under way at a time, for a
# connection repeats what is lost by itself.
LOOKS = 4
SILENT = LOOKS - 1


class Watched(Protocol):
    """What is watched: a session.

    Attributes:
        heard: something has come since the last look.
        quiet: how often a look found nothing new while something was waited for; below 0: nothing is.
    """

    heard: bool
    quiet: int

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
        on_silent: called with a session where something is waited for and the peer has said nothing for so long, once
            until it says something; None where peers are not asked, and only their hosts are watched.
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
        self._every_s = timeout_s / LOOKS
        self._host_s = max(timeout_s, host_s)
        self._host_looks = math.ceil(self._host_s / self._every_s)
        self._on_silent = on_silent
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """A session was made: see to it that they are watched."""
        if self._timer is None:
            self._timer = self._loop.call_later(self._every_s, self._look)

    def stop(self) -> None:
        """Watch no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        assert self._timer is not None
        # A loop that did not turn itself may not have read yet what came meanwhile.
        late = self._loop.time() - self._timer.when() > self._every_s / 2
        self._timer = None
        sessions = tuple(self._sessions())
        for session in sessions:
            if session.heard:
                session.heard, session.quiet = False, 0 if session.streams else -1
            elif not late:
                self._unheard(session)
        if sessions:
            self.start()

    def _unheard(self, session: W) -> None:
        if not session.streams:  # counted downwards: its silence until now says nothing of a stream that is opened
            session.quiet = min(session.quiet, 0) - 1
            if session.quiet < -self._host_looks:
                session.quiet = -1
                self._end_if_gone(session)
            return
        session.quiet = max(session.quiet, -1) + 1
        if session.quiet > 0 and self._on_silent is not None:
            session.ping()
            if session.quiet == SILENT:
                self._on_silent(session)
        if session.quiet >= self._host_looks:
            self._end_if_gone(session)

    def _end_if_gone(self, session: W) -> None:
        if session.host_gone(self._host_s):
            session.abandon(f"its host acknowledged nothing for {self._host_s:g} s, see TRD_HOST_TIMEOUT_S")
