"""The listening side of a worker: its sockets and the sessions that they accept.

Any process that reaches a socket can connect, and an idle connection costs it nothing. So connections without a hello
are counted apart: above the limit, the newest replaces the one that has waited longest. A client that behaves sends its
hello at once, and gets in however many others there are.
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
from triton_distributed.system.protocol import StreamProtocol
from triton_distributed.transport import memory, tcp
from triton_distributed.transport.acceptor import Acceptor
from triton_distributed.transport.address import Address
from triton_distributed.transport.kept import KeptSockets
from triton_distributed.transport.liveness import Liveness
from triton_distributed.transport.network import Networks
from triton_distributed.transport.session import Session
from triton_distributed.transport.tls import SessionTls
from triton_distributed.wire.frames import GoawayCode

logger = logging.getLogger("triton_distributed.transport")

TURNED_AWAY_EVERY_S = 10.0
"""Seconds between two log entries about rejected peers: an attack must not fill a disk."""

AcceptedFactory = Callable[[Callable[[Session, str], None]], Session]


class Listener:
    """Accepts sessions on one or more addresses.

    Args:
        loop: the running loop.
        factory: makes the session of an accepted connection, from a function that it calls when it is lost.
        max_sessions: number of sessions; further connections are refused with the reason, and closed.
        max_greeting: number of connections that may be without a hello at once.
        tls: TLS for TCP connections; None for plain TCP. Unix sockets are plain: only their user may enter the folder.
        networks: the networks besides sockets and memory, by scheme.
        health_timeout_s: the period of checks of TCP sessions, in seconds; see `Liveness`.
        host_timeout_s: seconds after which a TCP session to an unreachable host ends.
        looked: called after each check of its Unix sockets, a few times a second: `reached` may have changed.

    Attributes:
        sessions: the open sessions, oldest first.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        factory: AcceptedFactory,
        max_sessions: int,
        health_timeout_s: float,
        host_timeout_s: float,
        tls: SessionTls | None = None,
        networks: Networks | None = None,
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
        self._greeting: dict[Session, None] = {}  # without a hello, oldest first
        self._unix = KeptSockets(loop, lambda sock: self._take(sock, self._accept), looked)
        self._acceptors: list[Acceptor] = []
        self._stops: list[Callable[[], object]] = []  # called when listening ends; both at most one for each address
        self._stopped = False
        self._liveness = Liveness(loop, lambda: self.sessions, health_timeout_s, host_timeout_s, None)
        self.sessions: dict[Session, None] = {}

    async def listen(self, address: Address, make_folder: Callable[[], object] | None = None) -> Address:
        """Begin to listen on one more address; TCP port 0 means any free port.

        Args:
            make_folder: for a Unix socket, see `KeptSockets.add`.

        Returns:
            the address with the actual port.

        Raises:
            BrokerError: the scheme's server, e.g. NATS, cannot be reached.
            OSError: the address cannot be bound; the text names the address.
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
        except BrokerError:  # its text names the broker that cannot be reached
            raise
        except OSError as error:
            raise OSError(error.errno or errno.EADDRNOTAVAIL, f"cannot listen on {address}: {error}") from error
        return address

    def _take(self, sock: socket.socket, accept: Callable[[bool], StreamProtocol]) -> Acceptor:
        return Acceptor(self._loop, sock, accept, self._ran_out)

    def reached(self, addresses: tuple[str, ...]) -> tuple[str, ...]:
        """Return those of this listener's `addresses` at which clients can reach it now."""
        return self._unix.reached(addresses)

    def _ran_out(self) -> None:
        self._give_way("this process has no descriptors left, see `ulimit -n`")

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
            self._give_way(f"{self._max_greeting:,} connections here have not sent a hello, see TRD_MAX_GREETING")
        self._greeting[session] = None
        session.ready.add_done_callback(lambda _: self._greeting.pop(session, None))
        return session

    def _give_way(self, words: str) -> bool:
        """End the connection that has waited longest without a hello. False: all have sent theirs."""
        for session in self._greeting:
            del self._greeting[session]
            session.break_off(GoawayCode.BUSY, words)
            return True
        return False

    def _accept_tcp(self, few_descriptors: bool) -> StreamProtocol:
        session = self._accept(few_descriptors)
        self._liveness.start()  # Other schemes need none: both ends are on one host, or the transport detects the loss.
        return session if self._tls is None else self._tls.accepting(session)

    def forget(self, session: Session, reason: str) -> None:
        """Note that `session` was lost, or that its peer accepts no more streams."""
        if session.lost is not None:
            self.sessions.pop(session, None)
            if session.turned_away:
                self._log_turned_away(session.address, reason)

    def _log_turned_away(self, peer: str, reason: str) -> None:
        if (suppressed := self._turned_away.due()) is not None:
            more = f" (and {suppressed:,} more since the last such line)" if suppressed else ""
            logger.warning("turned %s away: %s%s", peer, reason, more)

    def remove_files(self) -> None:
        """Remove the files of the Unix sockets, because the process ends at once. Any thread may call this."""
        self._unix.remove_files()

    def close_listening(self) -> None:
        """Stop accepting; the sessions stay. A connection that is being accepted is refused and closed."""
        self._stopped = True
        self._unix.close()
        for acceptor in self._acceptors:
            acceptor.close()
        for stop in self._stops:
            stop()
        self._acceptors.clear()
        self._stops.clear()

    def close(self) -> None:
        """Stop accepting and close every session; open streams fail."""
        self.close_listening()
        self._liveness.stop()
        for session in list(self.sessions):
            session.close()
