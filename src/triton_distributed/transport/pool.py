"""Sessions to workers: dialled once, shared by every call, replaced when they are lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from triton_distributed.errors import ConnectionFailed, ProtocolError
from triton_distributed.transport import memory, tcp, unix
from triton_distributed.transport.address import Address
from triton_distributed.transport.session import Session

Addresses = tuple[str, ...]
SessionFactory = Callable[[str, Callable[[Session, str], None]], Session]


class SessionPool:
    """One session to each worker.

    Args:
        loop: the running loop.
        factory: makes an unconnected session from its address and the function to call when it is lost.
        timeout_s: seconds for one address to connect and exchange hellos.
        on_lost: called with the addresses of a session that was lost, or that takes no more streams.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        factory: SessionFactory,
        timeout_s: float,
        on_lost: Callable[[Addresses, str], None],
    ) -> None:
        self._loop = loop
        self._factory = factory
        self._timeout_s = timeout_s
        self._on_lost = on_lost
        self._live: dict[Addresses, Session] = {}
        self._dialling: dict[Addresses, asyncio.Task[Session]] = {}
        self._greeting: set[Session] = set()  # connected or about to be, at most one a dial
        self._parted: set[Session] = set()  # going away with streams still open
        self._closed = False

    def get(self, addresses: Addresses) -> Session | None:
        """The live session to these addresses, if there is one."""
        return self._live.get(addresses)

    async def connect(self, addresses: Addresses) -> Session:
        """A session to the first of `addresses` that can be reached; everybody who waits shares one attempt.

        Raises:
            ConnectionFailed: none can be; it names each address and why.
        """
        session = self.get(addresses)
        if session is not None:
            return session
        task = self._dialling.get(addresses)
        if task is None:
            task = self._dialling[addresses] = self._loop.create_task(self._dial(addresses))
            task.add_done_callback(lambda done: self._dialled(addresses, done))
        return await asyncio.shield(task)

    def _dialled(self, addresses: Addresses, task: asyncio.Task[Session]) -> None:
        del self._dialling[addresses]
        if not task.cancelled():
            task.exception()  # whoever waited has it; nobody may be left

    async def _dial(self, addresses: Addresses) -> Session:
        attempts: list[tuple[str, str]] = []
        for address in addresses:
            session = self._factory(address, lambda lost, reason: self._lost(addresses, lost, reason))
            self._greeting.add(session)
            try:
                async with asyncio.timeout(self._timeout_s):
                    await join(self._loop, Address.parse(address), session)
                    await session.ready
            except TimeoutError:
                attempts.append((address, f"no answer within {self._timeout_s:g} s, see TRD_CONNECT_TIMEOUT_S"))
            except (OSError, ProtocolError, ValueError) as error:  # a record may name what is no address at all
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
                    return session
                attempts.append((address, session.lost or (session.going or (0, "it takes no calls"))[1]))
            finally:
                self._greeting.discard(session)
            session.close()
        raise ConnectionFailed("a worker", attempts)

    def _lost(self, addresses: Addresses, session: Session, reason: str) -> None:
        if session.lost is not None:
            self._parted.discard(session)
        if self._live.get(addresses) is session:
            del self._live[addresses]
            if session.lost is None:
                self._parted.add(session)
            if not self._closed:
                self._on_lost(addresses, reason)

    def release_in_child(self) -> None:
        """This process is a fork: give up its copies of the sockets."""
        for session in (*self._greeting, *self._live.values(), *self._parted):
            session.release_in_child()

    async def close(self) -> None:
        """Close every session; open streams fail."""
        self._closed = True
        for task in list(self._dialling.values()):
            task.cancel()
        if self._dialling:
            await asyncio.wait(list(self._dialling.values()))
        for session in [*self._live.values(), *self._parted]:
            session.close()
        self._live.clear()
        self._parted.clear()


async def join(loop: asyncio.AbstractEventLoop, address: Address, session: Session) -> None:
    """Connect an unconnected session to an address.

    Raises:
        OSError: it cannot be reached.
    """
    if address.scheme == "unix":
        await unix.connect(loop, address.host, session)
    elif address.scheme == "tcp":
        await tcp.connect(loop, address.host, address.port, session)
    else:
        memory.network_of(loop).connect(loop, address.host, session)
