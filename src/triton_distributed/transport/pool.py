"""Sessions to workers: dialled once, shared by every call, replaced when they are lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from triton_distributed.errors import ConnectionFailed, ProtocolError
from triton_distributed.system import unix_sockets
from triton_distributed.transport import memory, tcp
from triton_distributed.transport.address import Address
from triton_distributed.transport.liveness import HEALTH_S, HOST_S, Liveness
from triton_distributed.transport.network import Networks
from triton_distributed.transport.session import Session
from triton_distributed.transport.tls import SessionTls

logger = logging.getLogger("triton_distributed.transport")

Addresses = tuple[str, ...]
# This many addresses of one worker are tried, so that a dial ends. A host has fewer ways to it.
MOST_ADDRESSES = 8
HINT_PLAIN = " before its hello: if it takes TLS only, set TRD_TLS_CERT, TRD_TLS_KEY and TRD_TLS_CA"
HINT_TLS = (
    " before its hello: it may not accept the certificate of TRD_TLS_CERT (TRD_TLS_CA there), or be at capacity "
    "(TRD_MAX_SESSIONS there)"
)
SessionFactory = Callable[[str, Callable[[Session, str], None]], Session]


class SessionPool:
    """One session to each worker.

    Args:
        loop: the running loop.
        factory: makes an unconnected session from its address and the function to call when it is lost.
        timeout_s: seconds for one address to connect and exchange hellos.
        on_lost: called with the addresses of a session that was lost, that takes no more streams, or whose worker says
            nothing while something is waited for. A silent session stays: the next call may find it awake.
        health_timeout_s: seconds that it may say nothing.
        host_timeout_s: seconds after which a session to a host that is gone ends.
        tls: of TCP sessions; None for plain ones.
        networks: what serves the schemes that are not sockets or memory.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        factory: SessionFactory,
        timeout_s: float,
        on_lost: Callable[[Addresses, str], None],
        health_timeout_s: float = HEALTH_S,
        host_timeout_s: float = HOST_S,
        tls: SessionTls | None = None,
        networks: Networks | None = None,
    ) -> None:
        self._loop = loop
        self._factory = factory
        self._timeout_s = timeout_s
        self._on_lost = on_lost
        self._tls = tls
        self._networks = networks or {}
        self._live: dict[Addresses, Session] = {}
        self._dialling: dict[Addresses, asyncio.Task[Session]] = {}
        self._greeting: dict[Session, None] = {}  # connected or about to be, at most one a dial
        self._parted: dict[Session, None] = {}  # going away with streams still open
        self._closed = False
        self._health_timeout_s = health_timeout_s
        self._liveness = Liveness(
            loop, lambda: (*self._live.values(), *self._parted), health_timeout_s, host_timeout_s, self._silent
        )

    @property
    def sessions(self) -> tuple[Session, ...]:
        """All sessions: those that greet, those that are open, and those that go away with streams still open."""
        return (*self._greeting, *self._live.values(), *self._parted)

    def get(self, addresses: Addresses) -> Session | None:
        """The live session to these addresses, if there is one."""
        return self._live.get(addresses)

    async def connect(self, addresses: Addresses) -> Session:
        """A session to the first of `addresses` that can be reached; all that wait share one attempt.

        Raises:
            ConnectionFailed: none of them can be reached; it names each address and why.
        """
        session = self.get(addresses)
        if session is not None:
            return session
        task = self._dialling.get(addresses)
        if task is None:
            task = self._dialling[addresses] = self._loop.create_task(self._dial(addresses))
            task.add_done_callback(lambda done: self._dialled(addresses, done))
        return await asyncio.shield(task)

    async def probe(self, addresses: Addresses) -> None:
        """Prove that the worker at these addresses takes calls, and that its loop turns.

        A new session proves it with its hello, one that is there by answering a PING: a stopped process keeps its
        connections, and the kernel takes new ones for it.

        Raises:
            ConnectionFailed: it does not, or cannot be reached.
        """
        session = self.get(addresses)
        if session is None:
            session = await self.connect(addresses)
        else:
            answered, _ = await asyncio.wait([session.ping()], timeout=self._timeout_s)
            if not answered:
                words = f"no answer to a PING within {self._timeout_s:g} s, see TRD_CONNECT_TIMEOUT_S"
                raise ConnectionFailed("a worker", [(session.address, words)])
        if not session.usable:
            words = session.lost or session.connection.going or "it takes no calls"
            raise ConnectionFailed("a worker", [(session.address, words)])

    def _silent(self, session: Session) -> None:
        words = f"nothing was heard for {self._health_timeout_s:g} s, see TRD_HEALTH_TIMEOUT_S"
        logger.info("session %s: %s", session.address, words)
        for addresses, live in self._live.items():
            if live is session:
                self._on_lost(addresses, words)
                break
        # Later: all that fell silent in this look have left the rotation then.
        self._loop.call_soon(session.fell_silent, words)

    def _dialled(self, addresses: Addresses, task: asyncio.Task[Session]) -> None:
        del self._dialling[addresses]
        if not task.cancelled():
            task.exception()  # the callers that waited have it, and perhaps none is left

    async def _dial(self, addresses: Addresses) -> Session:
        attempts: list[tuple[str, str]] = []
        if not addresses:
            attempts.append(("no address", "it listens on Unix sockets of another host only, set TRD_LISTEN there"))
        for address in addresses[:MOST_ADDRESSES]:
            session = self._factory(address, partial(self._lost, addresses))
            self._greeting[session] = None
            try:
                async with asyncio.timeout(self._timeout_s):
                    await join(self._loop, Address.parse(address), session, self._tls, self._networks)
                    await session.ready
            except TimeoutError:
                words = f"no answer within {self._timeout_s:g} s, see TRD_CONNECT_TIMEOUT_S"
                attempts.append((address, words + _advice(address)))
            except OSError as error:
                attempts.append((address, (str(error) or type(error).__name__) + _advice(address)))
            except (ProtocolError, ValueError) as error:  # a record may name what is no address at all
                attempts.append((address, str(error) or type(error).__name__))
            except BaseException:
                session.close()
                raise
            else:
                if self._closed:
                    session.close()
                    raise ConnectionFailed("a worker", [(address, "the runtime was shut down")])
                if session.usable:
                    self._live[addresses] = session
                    self._liveness.start()
                    return session
                attempts.append((address, session.lost or session.connection.going or "it takes no calls"))
            finally:
                self._greeting.pop(session, None)
            session.close()
        raise ConnectionFailed("a worker", attempts)

    def _lost(self, addresses: Addresses, session: Session, reason: str) -> None:
        if session.lost is not None:
            self._parted.pop(session, None)
        if self._live.get(addresses) is session:
            del self._live[addresses]
            if session.lost is None:
                self._parted[session] = None
            if not self._closed:
                self._on_lost(addresses, reason)

    def ask(self, addresses: Addresses) -> None:
        """Discovery says that the worker is gone, or is going: end its sessions now where it does not answer."""
        for session in (self._live.get(addresses), *self._parted):
            if session is not None and session.address in addresses:
                session.ask()

    async def close(self) -> None:
        """Close every session; open streams fail."""
        self._closed = True
        self._liveness.stop()
        for task in list(self._dialling.values()):
            task.cancel()
        if self._dialling:
            await asyncio.wait(list(self._dialling.values()))
        for session in [*self._live.values(), *self._parted]:
            session.close()
        self._live.clear()
        self._parted.clear()


def _advice(address: str) -> str:
    if not address.startswith("tcp:"):
        return ""
    return " (the worker advertises that address, see TRD_ADVERTISE and TRD_LISTEN there)"


async def join(
    loop: asyncio.AbstractEventLoop,
    address: Address,
    session: Session,
    tls: SessionTls | None,
    networks: Networks,
) -> None:
    """Connect an unconnected session to an address.

    Args:
        tls: of a TCP session; its handshake may go on when this returns.

    Raises:
        OSError: it cannot be reached.
    """
    if address.scheme in networks:
        await networks[address.scheme].connect(address, session)
    elif address.scheme == "unix":
        await unix_sockets.connect(loop, address.host, session)
    elif address.scheme == "tcp":
        session.hint_before_hello = HINT_PLAIN if tls is None else HINT_TLS
        await tcp.connect(loop, address.host, address.port, session if tls is None else tls.dialling(session))
    elif address.scheme == "memory":
        memory.network_of(loop).connect(loop, address.host, session)
    else:
        raise OSError(f"this runtime cannot dial {address.scheme} addresses")
