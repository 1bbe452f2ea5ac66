"""Sessions over NATS: `nats://SUBJECT`.

To open one, the dialer subscribes to a subject of its own and publishes OPEN on the worker's; the worker subscribes to
a new subject for this session and answers OPENED. Then each end publishes on the other's subject
(`transport.nats.messages`).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

from triton_distributed.errors import BrokerError
from triton_distributed.external.nats import NatsConnection
from triton_distributed.external.nats_port import NatsPort
from triton_distributed.system.protocol import StreamProtocol
from triton_distributed.transport.address import Address
from triton_distributed.transport.nats import messages as m
from triton_distributed.transport.nats.transport import LARGEST_MESSAGE, NatsTransport
from triton_distributed.wire.window import WindowBudget

if TYPE_CHECKING:
    from nats.aio.msg import Msg

logger = logging.getLogger("triton_distributed.nats")

# One end may have this many unacknowledged bytes under way: 3 GB/s at 0.3 ms from end to end.
WINDOW = 1024 * 1024
# The windows of all sessions of one process have this many bytes together. A NATS server drops a client if 64 MiB wait
# for it unread (`max_pending`): this is half of that. With more sessions each gets less, see `WindowBudget`.
ALL_WINDOWS = 32 * 1024 * 1024
# Seconds between the beats of a session on which nothing else is sent. A process that ended is noticed at the next
# beat; one message a second for each session costs very little.
BEAT_S = 1.0
# This many sessions send their beats in one turn of the loop, which takes about a millisecond.
AT_ONCE = 256
# At most this many sessions may be opening to this process; further dialers get no answer, and try again.
MOST_OPENING = 10_000
# For this many seconds after a reconnection a subject without a listener proves nothing: its worker may be reconnecting
# too. It is dialled again meanwhile, every `DIAL_AGAIN_S` seconds.
FORGIVING_S = 2.0
DIAL_AGAIN_S = 0.1

Factory = Callable[[], StreamProtocol]


class NatsNetwork:
    """Dials and listens over one connection to NATS.

    Args:
        loop: the running loop.
        connection: the runtime's shared connection to NATS; used from the first session on.
        timeout_s: seconds that a dialer waits for the connection.
        beat_s: seconds between the beats of an idle session.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: NatsConnection,
        timeout_s: float = 5.0,
        beat_s: float = BEAT_S,
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._timeout_s = timeout_s
        self._beat_s = beat_s
        self._port: NatsPort | None = None
        self._budget = WindowBudget(WINDOW, ALL_WINDOWS)
        self._transports: set[NatsTransport] = set()
        self._blocked: set[NatsTransport] = set()
        self._listening: dict[str, tuple[Factory, Any]] = {}  # by subject, with its subscription
        self._tasks: set[asyncio.Task[None]] = set()
        self._pumping: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._forgiving_until = 0.0  # on the loop's clock
        self._closed = False

    def __repr__(self) -> str:
        return f"<NatsNetwork {self._connection.where}, {len(self._transports)} sessions>"

    # dialling and listening

    async def connect(self, address: Address, protocol: StreamProtocol) -> None:
        """Connect `protocol` to the worker that listens on `address`.

        Raises:
            BrokerError: NATS cannot be reached.
            ConnectionRefusedError: nothing listens on that subject.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                port = await self._connected()
        except TimeoutError:
            reason = f"{self._connection.trouble} (tried for {self._timeout_s:g} s)"
            raise BrokerError("NATS", self._connection.where, reason) from None
        while True:
            try:
                await self._dial(port, address, protocol)
            except ConnectionRefusedError as error:
                if self._loop.time() > self._forgiving_until:
                    raise ConnectionRefusedError(errno.ECONNREFUSED, f"{error}, at NATS {port.where}") from None
                await asyncio.sleep(DIAL_AGAIN_S)
            else:
                return

    async def _dial(self, port: NatsPort, address: Address, protocol: StreamProtocol) -> None:
        transport = self._transport(protocol, port.inbox())
        transport.opened = opened = self._loop.create_future()
        try:
            transport.subscription = await port.subscribe(transport.subject, transport.take)
            if not port.publish(address.host, m.opening(m.OPEN, transport.window), transport.subject):
                raise BrokerError("NATS", port.where, "there is no connection at the moment")
            await opened
        except BaseException:
            transport.abort()
            raise

    async def listen(self, address: Address, factory: Factory) -> Callable[[], None]:
        """Connect each end that dials `address` to a protocol from `factory`; the returned function stops that.

        Raises:
            BrokerError: NATS cannot be reached.
            OSError: this runtime listens there already.
        """
        subject = address.host
        if subject in self._listening:
            raise OSError(errno.EADDRINUSE, f"{address} has a listener already")
        port = await self._connected()
        subscription = await port.subscribe(subject, partial(self._open, subject))
        self._listening[subject] = factory, subscription
        try:
            await port.flush()  # the server has the subscription before a client can learn the address
        except Exception as error:  # nats-py raises errors of many types.
            self._stop_listening(subject)
            raise BrokerError("NATS", port.where, str(error) or type(error).__name__) from error
        return lambda: self._stop_listening(subject)

    def _stop_listening(self, subject: str) -> None:
        _, subscription = self._listening.pop(subject, (None, None))
        if subscription is not None and not self._closed:
            self._spawn(_unsubscribe(subscription))

    async def _connected(self) -> NatsPort:
        client = await self._connection.client()
        if self._port is None or self._port.closed:
            self._port = NatsPort(self._connection, client)
        if self._closed:
            raise BrokerError("NATS", self._connection.where, "the runtime was shut down")
        if self._timer is None:
            self._connection.reconnected.append(self._reconnected)
            self._timer = self._loop.call_later(self._beat_s, self._tick)
        return self._port

    def _transport(self, protocol: StreamProtocol, subject: str) -> NatsTransport:
        made = NatsTransport(self._loop, self, protocol, subject, self._budget.reserve())
        self._transports.add(made)
        return made

    def _open(self, subject: str, message: Msg) -> None:
        if self._closed:
            return
        version, window = m.read_opening(message.data)
        if not window or not message.reply or message.data[0] != m.OPEN or len(self._tasks) > MOST_OPENING:
            return  # not for this protocol, or too many: the dialer times out
        if version != m.VERSION:
            words = f"this worker speaks version {m.VERSION} of sessions over NATS, not {version}"
            self.publish(message.reply, m.HEADER.pack(m.CLOSE, 0, 0) + words.encode(), subject)
            return
        self._spawn(self._accept(subject, message.reply, window))

    async def _accept(self, subject: str, peer: str, window: int) -> None:
        try:
            port = await self._connected()
        except BrokerError as error:  # closed meanwhile: no answer can be sent, and the dialer times out
            logger.debug("a session was not opened: %s", error)
            return
        own = f"{subject}.{os.urandom(12).hex()}"
        listening = self._listening.get(subject)
        if listening is None:
            return  # listening stopped meanwhile
        protocol = listening[0]()
        transport = self._transport(protocol, own)
        try:
            transport.subscription = await port.subscribe(own, transport.take)
        except BaseException as error:
            transport.abort()
            protocol.connection_lost(None)  # it was never connected, but its listener counts it
            if not isinstance(error, Exception):
                raise
            logger.debug("a session was not opened: %s", error)
            return
        self.publish(peer, m.opening(m.OPENED, transport.window), own)
        transport.begin(peer, window)

    # what the ends of sessions need

    @property
    def largest(self) -> int:
        """The largest message in bytes."""
        return min(LARGEST_MESSAGE, self._port.max_payload) if self._port is not None else LARGEST_MESSAGE

    def publish(self, subject: str, data: bytes, reply: str) -> bool:
        """Send a message; False if it cannot be sent now."""
        try:
            return not self._closed and self._port is not None and self._port.publish(subject, data, reply)
        except Exception as error:  # from the client library; if it persists, missing beats end the session
            logger.warning("NATS at %s accepts no message: %s", self._connection.where, error)
            return False

    def blocked(self, transport: NatsTransport) -> None:
        """Call `transport.push` when the connection accepts more. After a reconnection `reconnected` is called."""
        self._blocked.add(transport)
        if self._pumping is None and self._port is not None and self._port.connected:
            self._pumping = self._spawn(self._pump(self._port))

    async def _pump(self, port: NatsPort) -> None:
        try:
            while self._blocked and port.connected:
                await port.room()
                blocked, self._blocked = self._blocked, set()
                for each in blocked:
                    each.push()
                await asyncio.sleep(0)
        except Exception as error:  # connection lost: `_reconnected` follows, or missing beats end the sessions
            logger.debug("NATS at %s: %s", self._connection.where, error)
        finally:
            self._pumping = None

    def left(self, transport: NatsTransport) -> None:
        """Drop an end that is gone."""
        self._blocked.discard(transport)
        if transport in self._transports:
            self._transports.remove(transport)
            self._budget.release(transport.window)
            if transport.subscription is not None and not self._closed:
                self._spawn(_unsubscribe(transport.subscription))

    # time and loss

    def _tick(self) -> None:
        self._timer = self._loop.call_later(self._beat_s, self._tick)
        if self._port is not None and self._port.closed:
            for each in list(self._transports):
                each.fail(f"the connection to NATS at {self._connection.where} was closed")
            if self._listening and not self._tasks:
                self._spawn(self._listen_again())
        else:
            self._beat(list(self._transports))

    def _beat(self, transports: list[NatsTransport]) -> None:
        for each in transports[:AT_ONCE]:
            each.tick()
            if each in self._blocked:
                self.blocked(each)
        if len(transports) > AT_ONCE:
            self._loop.call_soon(self._beat, transports[AT_ONCE:])

    async def _listen_again(self) -> None:
        """Subscribe again after the client gave up for good, e.g. because its credentials were refused for a while."""
        try:
            port = await self._connected()
            for subject, (factory, _) in list(self._listening.items()):
                subscription = await port.subscribe(subject, partial(self._open, subject))
                self._listening[subject] = factory, subscription
        except Exception as error:  # This task has no caller that could get the error.
            logger.warning("NATS at %s: %s", self._connection.where, error)

    def _reconnected(self) -> None:
        self._forgiving_until = self._loop.time() + FORGIVING_S
        for each in list(self._transports):
            each.reconnected()
        if self._blocked:
            self.blocked(next(iter(self._blocked)))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """End every session and stop listening; the connection's owner closes the connection."""
        for each in list(self._transports):
            each.abort()
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._connection.reconnected.remove(self._reconnected)
        self._listening.clear()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))


async def _unsubscribe(subscription: Any) -> None:
    try:
        await subscription.unsubscribe()
    except Exception as error:  # the connection was lost, and the subscription with it
        logger.debug("unsubscribing from %s: %s", subscription.subject, error)
