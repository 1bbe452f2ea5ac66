"""Sessions that say nothing while something is waited for.

A process that is stopped, or whose loop does not turn, keeps its connections: the kernel acknowledges what is sent and
even accepts new ones. Only an answered PING, or any other byte, shows that its loop turns. Silence fails no stream: the
process may go on, and so do its streams then. It only counts as a sign to send further calls elsewhere.

A host that is gone acknowledges nothing, and after a longer time the kernel ends its sessions: see `transport.tcp`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton_distributed.transport.session import Session

# Looks within the timeout. The first that finds nothing new sends a PING, the third says that the session is silent:
# by then three to four parts of the timeout have passed since the last byte. One PING is under way at a time, for a
# connection repeats what is lost by itself.
LOOKS = 4
SILENT = LOOKS - 1


class Liveness:
    """Watches the sessions of one pool with one timer, which runs while there are any.

    Args:
        loop: the running loop.
        sessions: those that are open, at any time.
        timeout_s: seconds without a byte from the peer.
        on_silent: called with a session where something is waited for and the peer has said nothing for so long, once
            until it says something.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sessions: Callable[[], Iterable[Session]],
        timeout_s: float,
        on_silent: Callable[[Session], None],
    ) -> None:
        self._loop = loop
        self._sessions = sessions
        self._timeout_s = timeout_s
        self._on_silent = on_silent
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """A session was made: see to it that they are watched."""
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout_s / LOOKS, self._look)

    def stop(self) -> None:
        """Watch no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        assert self._timer is not None
        # A loop that did not turn itself may not have read yet what came meanwhile.
        late = self._loop.time() - self._timer.when() > self._timeout_s / LOOKS / 2
        self._timer = None
        sessions = tuple(self._sessions())
        for session in sessions:
            if not session.streams:
                session.heard, session.quiet = False, -1
            elif session.heard:
                session.heard, session.quiet = False, 0
            elif not late:
                session.quiet += 1
                if session.quiet > 0:
                    session.ping()
                if session.quiet == SILENT:
                    self._on_silent(session)
        if sessions:
            self.start()
