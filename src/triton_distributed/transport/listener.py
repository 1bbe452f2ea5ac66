"""Where a worker is reached: the listening sockets and the sessions that came in through them.

Whoever reaches a socket can connect, and a connection that says nothing costs its owner nothing. So those that have not
said hello are counted apart: where they are too many, the one that has waited longest gives way to the newest, and a
client that behaves, which says hello at once, gets in however many there are.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from pathlib import Path

from triton_distributed.errors import BrokerError
from triton_distributed.quiet import Quiet
from triton_distributed.transport import memory, tcp
from triton_distributed.transport.acceptor import Acceptor
from triton_distributed.transport.address import Address
from triton_distributed.transport.kept import KeptSockets
from triton_distributed.transport.liveness import HEALTH_S, HOST_S, Liveness
from triton_distributed.transport.network import Networks
from triton_distributed.transport.session import Session
from triton_distributed.transport.tls import SessionTls
from triton_distributed.wire.frames import GoawayCode

logger = logging.getLogger("triton_distributed.transport")

TURNED_AWAY_EVERY_S = 10.0
"""Seconds between two log entries for peers that were turned away: an attack must not fill a disk."""

AcceptedFactory = Callable[[Callable[[Session, str], None]], Session]


class Listener:
    """Accepts sessions on one address or several.

    Args:
        loop: the running loop.
        factory: makes the session of an accepted connection from the function to call when it is lost.
        max_sessions: further connections are told that there are too many, and closed.
        max_greeting: connections that may be without their hello at once.
        tls: of TCP connections; None for plain ones. Unix sockets are plain: their folder is the user's alone.
        networks: what serves the schemes that are not sockets or memory.
        health_timeout_s: how often TCP sessions are looked at, see `Liveness`.
        host_timeout_s: seconds after which a TCP session to a host that is gone ends.
        looked: called after each look at its Unix sockets, some times a second: `reached` may have changed.

    Attributes:
        sessions: those that are open, in the order in which they came.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        factory: AcceptedFactory,
        max_sessions: int,
        tls: SessionTls | None = None,
        networks: Networks | None = None,
        health_timeout_s: float = HEALTH_S,
        host_timeout_s: float = HOST_S,
        max_greeting: int = 1000,
        *,
        looked: Callable[[], None] = lambda: None,
    ) -> None:
        self._loop = loop
        self._factory = factory
        self._max_sessions = max_sessions
        self._tls = tls
        self._networks = networks or {}
        self._turned_away = Quiet(TURNED_AWAY_EVERY_S, loop.time)
        self._max_greeting = max_greeting
        self._greeting: dict[Session, None] = {}  # in the order in which they came
        self._unix = KeptSockets(loop, lambda sock: self._take(sock, self._accept), looked)
        self._acceptors: list[Acceptor] = []
        self._stops: list[Callable[[], object]] = []  # what to do when listening ends; both at most one an address
        self._stopped = False
        self._liveness = Liveness(loop, lambda: self.sessions, health_timeout_s, host_timeout_s, None)
        self.sessions: dict[Session, None] = {}

    async def listen(self, address: Address, make_folder: Callable[[], object] | None = None) -> Address:
        """Begin to listen on one more address; TCP port 0 takes any free one.

        Args:
            make_folder: of a Unix socket, see `KeptSockets.add`.

        Returns:
            the address with the port that was found.

        Raises:
            BrokerError: what serves its scheme cannot be reached.
            OSError: the address cannot be bound; its text names the address.
        """
        self._stopped = False
        try:
            if address.scheme in self._networks:
                self._stops.append(await self._networks[address.scheme].listen(address, self._accept))
            elif address.scheme == "memory":
                self._stops.append(memory.network_of(self._loop).listen(address.host, self._accept))
            elif address.scheme == "unix":
                self._unix.add(Path(address.host), make_folder)
            else:
                socks = await tcp.listen(self._loop, address.host, address.port)
                self._acceptors += [self._take(sock, self._accept_tcp) for sock in socks]
                address = Address("tcp", address.host, socks[0].getsockname()[1])
        except BrokerError:  # it names the broker, which is what cannot be reached
            raise
        except OSError as error:
            raise OSError(error.errno or errno.EADDRNOTAVAIL, f"cannot listen on {address}: {error}") from error
        return address

    def _take(self, sock: socket.socket, accept: Callable[[bool], asyncio.Protocol]) -> Acceptor:
        return Acceptor(self._loop, sock, accept, self._ran_out)

    def reached(self, addresses: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `addresses`, which this listener has, under which it can be reached now."""
        return self._unix.reached(addresses)

    def _ran_out(self) -> None:
        self._give_way("no descriptors are left here, see `ulimit -n`")

    def _accept(self, few_descriptors: bool = False) -> Session:
        session = self._factory(self.forget)
        self.sessions[session] = None
        if self._stopped:
            session.refused = "the worker is shutting down"
        elif len(self.sessions) > self._max_sessions:
            words = f"{self._max_sessions:,} sessions are open here, see TRD_MAX_SESSIONS"
            if not self._give_way(words):
                session.refused = words
        elif few_descriptors:
            words = f"{len(self.sessions):,} sessions are open here, and few descriptors are left, see `ulimit -n`"
            if not self._give_way(words):
                session.refused = words
        elif len(self._greeting) >= self._max_greeting:
            self._give_way(f"{self._max_greeting:,} connections have not said hello here, see TRD_MAX_GREETING")
        self._greeting[session] = None
        session.ready.add_done_callback(lambda _: self._greeting.pop(session, None))
        return session

    def _give_way(self, words: str) -> bool:
        """End the connection that has waited longest without a hello. False: there is none."""
        for session in self._greeting:
            del self._greeting[session]
            session.break_off(GoawayCode.BUSY, words)
            return True
        return False

    def _accept_tcp(self, few_descriptors: bool) -> asyncio.Protocol:
        session = self._accept(few_descriptors)
        self._liveness.start()  # elsewhere both ends are on one host, or the transport knows by itself
        return session if self._tls is None else self._tls.accepting(session)

    def forget(self, session: Session, reason: str) -> None:
        """`session` is gone, or asks for no more streams."""
        if session.lost is not None:
            self.sessions.pop(session, None)
            if session.turned_away:
                self._log_turned_away(session.address, reason)

    def _log_turned_away(self, peer: str, reason: str) -> None:
        if (suppressed := self._turned_away.due()) is not None:
            more = f" (and {suppressed:,} more since the last such line)" if suppressed else ""
            logger.warning("turned %s away: %s%s", peer, reason, more)

    def close_listening(self) -> None:
        """Accept nothing more; the sessions stay. A connection that was being accepted is told so, and closed."""
        self._stopped = True
        self._unix.close()
        for acceptor in self._acceptors:
            acceptor.close()
        for stop in self._stops:
            stop()
        self._acceptors.clear()
        self._stops.clear()

    def close(self) -> None:
        """Accept nothing more and close every session; open streams fail."""
        self.close_listening()
        self._liveness.stop()
        for session in list(self.sessions):
            session.close()
