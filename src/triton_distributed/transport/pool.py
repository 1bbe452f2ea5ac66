"""Sessions to workers: dialled once, shared by all calls, replaced when they are lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextvars import Context
from functools import partial

from triton_distributed.errors import ConnectionFailed, ProtocolError
from triton_distributed.system import unix_sockets
from triton_distributed.transport import memory, tcp
from triton_distributed.transport.address import Address
from triton_distributed.transport.liveness import Liveness
from triton_distributed.transport.network import Networks
from triton_distributed.transport.session import Session
from triton_distributed.transport.tls import SessionTls

logger = logging.getLogger("triton_distributed.transport")

Addresses = tuple[str, ...]
# A dial tries at most this many addresses of one worker, so that its time is bounded. Real hosts have fewer.
MOST_ADDRESSES = 8
HINT_PLAIN = " before its hello: if it accepts only TLS, set TRD_TLS_CERT, TRD_TLS_KEY and TRD_TLS_CA"
HINT_TLS = (
    " before its hello: it may not accept the certificate of TRD_TLS_CERT (TRD_TLS_CA there), or be at capacity "
    "(TRD_MAX_SESSIONS there)"
)
SessionFactory = Callable[[str, Callable[[Session, str], None]], Session]


class SessionPool:
    """One session to each worker.

    Args:
        loop: the running loop.
        factory: makes an unconnected session from its address and a function that it calls when it is lost.
        timeout_s: seconds for one address to connect and exchange hellos.
        on_lost: called with the addresses and the reason when a session is lost, accepts no more streams, or is silent
            while it has open streams. A silent session stays open: the worker may recover.
        health_timeout_s: seconds without a byte after which a session is silent.
        host_timeout_s: seconds after which a session to an unreachable host ends.
        tls: TLS for TCP sessions; None for plain TCP.
        networks: the networks besides sockets and memory, by scheme.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        factory: SessionFactory,
        timeout_s: float,
        on_lost: Callable[[Addresses, str], None],
        health_timeout_s: float,
        host_timeout_s: float,
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
        self._greeting: dict[Session, None] = {}  # before their hello; at most one for each dial
        self._parted: dict[Session, None] = {}  # going away with streams still open
        self._closed = False
        self._health_timeout_s = health_timeout_s
        self._liveness = Liveness(
            loop, lambda: (*self._live.values(), *self._parted), health_timeout_s, host_timeout_s, self._silent
        )

    @property
    def sessions(self) -> tuple[Session, ...]:
        """All sessions: before their hello, open, and going away with streams still open."""
        return (*self._greeting, *self._live.values(), *self._parted)

    @property
    def dialling(self) -> int:
        """The number of sessions that are being made."""
        return len(self._dialling)

    def get(self, addresses: Addresses) -> Session | None:
        """Return the live session to these addresses, or None."""
        return self._live.get(addresses)

    async def connect(self, addresses: Addresses) -> Session:
        """Return a session to the first of `addresses` that can be reached; concurrent callers share one dial.

        Raises:
            ConnectionFailed: none of them can be reached; the error lists each address with its reason.
        """
        session = self.get(addresses)
        if session is not None:
            return session
        task = self._dialling.get(addresses)
        if task is None:
            # The callbacks of a session run in the context of its dial, which must not be that of one request.
            task = self._loop.create_task(self._dial(addresses), context=Context())
            self._dialling[addresses] = task
            task.add_done_callback(lambda done: self._dialled(addresses, done))
        return await asyncio.shield(task)

    async def probe(self, addresses: Addresses) -> None:
        """Test whether the worker at these addresses accepts calls and its loop turns.

        A new session shows it with its hello, an existing one by answering a PING. A connection alone proves nothing:
        the kernel keeps the connections of a stopped process, and accepts new ones for it.

        Raises:
            ConnectionFailed: the worker cannot be reached, or fails the test.
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
            words = session.lost or session.connection.going or "it accepts no calls"
            raise ConnectionFailed("a worker", [(session.address, words)])

    def _silent(self, session: Session) -> None:
        words = f"nothing was heard for {self._health_timeout_s:g} s, see TRD_HEALTH_TIMEOUT_S"
        logger.info("session %s: %s", session.address, words)
        for addresses, live in self._live.items():
            if live is session:
                self._on_lost(addresses, words)
                break
        # In the next turn: by then all sessions that this check found silent are out of rotation.
        self._loop.call_soon(session.fell_silent, words)

    def _dialled(self, addresses: Addresses, task: asyncio.Task[Session]) -> None:
        del self._dialling[addresses]
        if not task.cancelled():
            task.exception()  # the waiting callers have it, if any is left

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
            except (ProtocolError, ValueError) as error:  # a record may hold an invalid address
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
                attempts.append((address, session.lost or session.connection.going or "it accepts no calls"))
            finally:
                self._greeting.pop(session, None)
            session.close()
        raise ConnectionFailed("a worker", attempts)

    def _lost(self, addresses: Addresses, session: Session, reason: str) -> None:
        if session.lost is not None:
            self._parted.pop(session, None)
            if session.cut and not self._closed:
                logger.warning("the worker at %s was lost with %d call(s): %s", session.address, session.cut, reason)
        if self._live.get(addresses) is session:
            del self._live[addresses]
            if session.lost is None:
                self._parted[session] = None
            if not self._closed:
                self._on_lost(addresses, reason)

    def ask(self, addresses: Addresses) -> None:
        """Check a worker that left discovery: its sessions end now if it does not answer."""
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
        tls: TLS for a TCP session; its handshake may still go on when this returns.

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
