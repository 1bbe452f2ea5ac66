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
from triton_distributed.transport.session import Session

logger = logging.getLogger("triton_distributed.transport")


def stop_listening(loop: asyncio.AbstractEventLoop, server: asyncio.AbstractServer) -> None:
    """Close a server in a later step of the loop.

    asyncio hands a connection to its protocol in the step after that in which it accepted it; were the server closed
    between them, the connection would be neither served nor closed, and its client would wait for ever.
    """
    for sock in getattr(server, "sockets", ()):
        with contextlib.suppress(NotImplementedError):  # a loop that accepts in another way
            loop.remove_reader(sock.fileno())
    loop.call_soon(server.close)


AcceptedFactory = Callable[[Callable[[Session, str], None]], Session]


class Listener:
    """Accepts sessions on one address.

    Args:
        loop: the running loop.
        factory: makes the session of an accepted connection from the function to call when it is lost.
        max_sessions: further connections are told that there are too many, and closed.

    Attributes:
        address: where it listens, with the port that was found.
        sessions: those that are open.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, factory: AcceptedFactory, max_sessions: int) -> None:
        self._loop = loop
        self._factory = factory
        self._max_sessions = max_sessions
        self._server: asyncio.AbstractServer | None = None
        self._stop: Callable[[], None] | None = None
        self._inode = 0
        self._stopped = False
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
        if self._stopped:
            session.refused = "the worker is shutting down"
        elif len(self.sessions) > self._max_sessions:
            session.refused = f"{self._max_sessions:,} sessions are open here, see TRD_MAX_SESSIONS"
        return session

    def forget(self, session: Session, reason: str) -> None:
        """`session` is gone, or asks for no more streams."""
        if session.lost is not None:
            self.sessions.discard(session)

    def close_listening(self) -> None:
        """Accept nothing more; the sessions stay. A connection that was being accepted is told so, and closed."""
        self._stopped = True
        if self._stop is not None:
            self._stop()
            self._stop = None
        if self._server is not None:
            stop_listening(self._loop, self._server)
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
        self.close_listening()
        for session in list(self.sessions):
            session.close()
