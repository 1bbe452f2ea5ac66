"""Where a worker is reached: the listening sockets and the sessions that came in through them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import Callable
from pathlib import Path

from triton_distributed.transport import memory, tcp, unix
from triton_distributed.transport.address import Address
from triton_distributed.transport.inherited import give_up
from triton_distributed.transport.liveness import Liveness
from triton_distributed.transport.session import Session

logger = logging.getLogger("triton_distributed.transport")

AcceptedFactory = Callable[[Callable[[Session, str], None]], Session]


class Listener:
    """Accepts sessions on one address.

    Args:
        loop: the running loop.
        factory: makes the session of an accepted connection from the function to call when it is lost.
        max_sessions: further connections are told that there are too many, and closed.
        health_timeout_s: seconds after which a session to a host that is gone is lost.

    Attributes:
        address: where it listens, with the port that was found.
        sessions: those that are open.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        factory: AcceptedFactory,
        max_sessions: int,
        health_timeout_s: float = 10.0,
    ) -> None:
        self._loop = loop
        self._factory = factory
        self._max_sessions = max_sessions
        self._server: asyncio.AbstractServer | None = None
        self._stop: Callable[[], None] | None = None
        self._inode = 0
        self._closed = False
        self._parting: set[Session] = set()  # of the sessions, those whose peers have yet to close
        self._parted: asyncio.Future[None] | None = None
        self._liveness = Liveness(loop, lambda: self.sessions, health_timeout_s, None)
        self.address: Address | None = None
        self.sessions: set[Session] = set()

    async def listen(self, address: Address) -> Address:
        """Begin to listen; TCP port 0 takes any free one.

        Raises:
            OSError: the address cannot be bound; its text names the address.
        """
        try:
            if address.scheme == "memory":
                self._stop = memory.network_of(self._loop).listen(address.host, self._accept)
            elif address.scheme == "unix":
                self._server, self._inode = await unix.listen(self._loop, Path(address.host), self._accept)
            else:
                self._server = await tcp.listen(self._loop, address.host, address.port, self._accept)
                port = self._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
                address = Address("tcp", address.host, port)
        except OSError as error:
            raise OSError(error.errno or errno.EADDRNOTAVAIL, f"cannot listen on {address}: {error}") from error
        self.address = address
        return address

    def _accept(self) -> Session:
        session = self._factory(self.forget)
        self.sessions.add(session)
        if self.address is not None and self.address.scheme == "tcp":  # elsewhere both ends are on one host
            self._liveness.start()
        if self._closed:  # asyncio had accepted it already, and makes its session only now
            session.close()
        elif len(self.sessions) > self._max_sessions:
            session.refused = f"{self._max_sessions:,} sessions are open here, see TRD_MAX_SESSIONS"
        return session

    def forget(self, session: Session, reason: str) -> None:
        """`session` is gone, or asks for no more streams."""
        if session.lost is not None:
            self.sessions.discard(session)
            self._parting.discard(session)
            if self._parted is not None and not self._parting and not self._parted.done():
                self._parted.set_result(None)

    async def part(self, timeout_s: float) -> None:
        """Send every peer the end of what is said here, and wait until each has read it and closed its side.

        Args:
            timeout_s: for a peer that does not come to it; `close` then ends its session all the same.
        """
        self._parting = {each for each in self.sessions if each.finish()}
        if self._parting:
            self._parted = self._loop.create_future()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._parted

    def close_listening(self) -> None:
        """Accept nothing more; the sessions stay."""
        if self._stop is not None:
            self._stop()
            self._stop = None
        if self._server is not None:
            self._server.close()
            self._server = None
            assert self.address is not None
            if self.address.scheme == "unix":
                unix.remove(Path(self.address.host), self._inode)

    def release_in_child(self) -> None:
        """This process is a fork: give up its copies of the sockets."""
        for sock in getattr(self._server, "sockets", None) or ():
            give_up(sock)
        for session in self.sessions:
            session.release_in_child()

    def close(self) -> None:
        """Accept nothing more and close every session; open streams fail."""
        self._closed = True
        self.close_listening()
        self._liveness.stop()
        for session in list(self.sessions):
            session.close()
