"""Hears the KV events of an engine over ZeroMQ, as vLLM and SGLang publish them.

The engine numbers its batches from 0. A number that is missing is asked for at the engine's replay endpoint. What
the engine has no more makes the cache unknown: then it is reported as cleared, and known again block by block.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from triton_distributed.llm.contract.cache import CacheCleared, CacheEvents, Publish
from triton_distributed.llm.contract.errors import InvalidParameter
from triton_distributed.llm.kv_events.decode import EventDecoder

if TYPE_CHECKING:
    import zmq.asyncio

logger = logging.getLogger("triton_distributed.llm")

REPLAY_S = 1.0
"""Seconds in which the engine must have answered a replay. vLLM looks for requests every 0.1 s."""

TURN_S = 0.003
"""Seconds after which other tasks run, while many batches wait."""

MAX_WAITING = 100_000
"""Batches that wait in the socket at most, as many as the engine keeps for a slow reader. Further ones are a gap."""

_END = b"\xff" * 8  # The number of the last answer of a replay.


class EventSubscriber:
    """Hears one engine, or one data-parallel rank of it.

    Args:
        endpoint: where the engine publishes, e.g. `tcp://127.0.0.1:5557`.
        publish: gets the events, in their order, on the event loop.
        replay: where the engine answers with earlier batches; empty if it does not.
        topic: the beginning of the topics to hear; empty for all.
        rank: the data-parallel rank, where a batch does not tell it.

    Attributes:
        decoder: has counts of what was read.
        gaps: how often numbers were missing.
        lost: how often the cache became unknown: a gap that no replay has filled, or another process at the endpoint.
    """

    def __init__(self, endpoint: str, publish: Publish, *, replay: str = "", topic: str = "", rank: int = 0) -> None:
        self.endpoint, self.replay = endpoint, replay
        self.decoder = EventDecoder()
        self.gaps = self.lost = 0
        self._publish, self._topic, self._rank = publish, topic, rank
        self._context: zmq.asyncio.Context | None = None
        self._sockets: set[Any] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._order = asyncio.Lock()  # A replay comes whole before what was heard meanwhile.
        self._ranks: set[int] = set()  # Whose caches are known.
        self._process = 0  # Counts the processes at the endpoint.
        self._next, self._last = self._first, -1

    @property
    def unread(self) -> int:
        """Events and batches that could not be read."""
        return self.decoder.malformed + self.decoder.unknown

    @property
    def _first(self) -> int:
        """The number to expect at the beginning; -1 for any, where earlier batches are not available."""
        return 0 if self.replay else -1

    def start(self) -> None:
        """Connect, and hear from now on. The engine may start later. Call it on the event loop.

        Raises:
            ImportError: the extra `kv` is not installed.
            InvalidParameter: an endpoint is invalid.
        """
        zmq = _zmq()
        self._context = zmq.asyncio.Context()
        try:
            if self.replay:
                socket = self._made(zmq.DEALER)
                _connect(socket, self.replay)  # So that a mistake in it is known now.
                self._close(socket)
            socket = self._made(zmq.SUB)
            socket.subscribe(self._topic.encode())
            monitor = socket.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED)
            self._sockets.add(monitor)
            _connect(socket, self.endpoint)
        except BaseException:
            self._destroy()
            raise
        self._tasks = [
            asyncio.create_task(self._hear(socket), name=f"KV events of {self.endpoint}"),
            asyncio.create_task(self._follow(monitor), name=f"connection to {self.endpoint}"),
        ]

    async def close(self) -> None:
        """Disconnect. Nothing is published any more. Nothing happens at a second call."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
            self._tasks = []
        self._destroy()

    def _destroy(self) -> None:
        for socket in self._sockets:
            socket.close()
        self._sockets.clear()
        if self._context is not None:
            self._context.term()
            self._context = None

    def _made(self, kind: int) -> Any:
        assert self._context is not None
        socket = self._context.socket(kind)
        self._sockets.add(socket)
        socket.linger = 0
        socket.rcvhwm = MAX_WAITING
        socket.reconnect_ivl, socket.reconnect_ivl_max = 100, 2000  # In ms.
        return socket

    async def _hear(self, socket: Any) -> None:
        clock = asyncio.get_running_loop().time
        turn = clock()
        while True:
            frames = await socket.recv_multipart()
            if len(frames) != 3 or len(frames[1]) != 8:
                self.decoder.malformed += 1
                continue
            async with self._order:
                await self._take(int.from_bytes(frames[1], "big"), frames[2])
            if clock() - turn > TURN_S:  # What has come already is given without a wait.
                await asyncio.sleep(0)
                turn = clock()

    async def _follow(self, monitor: Any) -> None:
        """Another process may be at the endpoint after a lost connection, which has another cache."""
        zmq = _zmq()
        while True:
            event = await zmq.utils.monitor.recv_monitor_message(monitor)
            if event["event"] == zmq.EVENT_DISCONNECTED:
                self._forget("the connection ended")
                self._process += 1
                self._next, self._last = self._first, -1
            elif self.replay:
                async with self._order:
                    if self._last < 0:
                        await self._replay()

    async def _take(self, number: int, payload: bytes) -> None:
        if number <= self._last:
            self._forget("its numbers begin anew")
            self._next = self._first
        self._last = number
        if 0 <= self._next < number:
            self.gaps += 1
            process = self._process
            if self.replay:
                await self._replay()
            if process != self._process:
                return
            if self._next < number:
                self._forget(
                    f"{number - self._next} batches are missing" + ("" if self.replay else ", and no kv_replay is set")
                )
                self._next = number
        if self._next in (-1, number):
            self._next = number + 1
            self._hand(self.decoder.decode(payload))

    async def _replay(self) -> None:
        """Take the batches from the next one on that the engine still has, if it answers."""
        clock = asyncio.get_running_loop().time
        process, turn = self._process, clock()
        socket = self._made(_zmq().DEALER)
        try:
            _connect(socket, self.replay)
            async with asyncio.timeout(REPLAY_S) as limit:
                await socket.send_multipart([b"", self._next.to_bytes(8, "big")])
                while True:
                    number, payload = (await socket.recv_multipart())[-2:]
                    if number == _END or process != self._process:
                        return
                    limit.reschedule(clock() + REPLAY_S)
                    at = int.from_bytes(number, "big")
                    if at < self._next:
                        continue
                    if at > self._next:
                        self._forget(f"the engine has no batches before number {at} any more")
                    self._next = at + 1
                    self._hand(self.decoder.decode(payload))
                    if clock() - turn > TURN_S:
                        await asyncio.sleep(0)
                        turn = clock()
        except TimeoutError:
            logger.info("KV events of %s: %s did not answer within %g s", self.endpoint, self.replay, REPLAY_S)
        finally:
            self._close(socket)

    def _close(self, socket: Any) -> None:
        socket.close()
        self._sockets.discard(socket)

    def _hand(self, found: CacheEvents) -> None:
        if found.events:
            found.rank = found.rank or self._rank
            self._ranks.add(found.rank)
            try:
                self._publish(found)
            except Exception:
                logger.exception("KV events of %s could not be used", self.endpoint)

    def _forget(self, reason: str) -> None:
        """The caches are not known any more."""
        ranks, self._ranks = self._ranks, set()
        if ranks:
            self.lost += 1
            logger.warning("KV events of %s: %s; its cache is unknown now", self.endpoint, reason)
        for rank in ranks:
            self._hand(CacheEvents([CacheCleared()], rank))
        self._ranks.clear()


def _connect(socket: Any, endpoint: str) -> None:
    try:
        socket.connect(endpoint)
    except _zmq().ZMQError as error:
        raise InvalidParameter("kv_events", f"cannot connect to {endpoint!r}: {error}") from error


def _zmq() -> Any:
    try:
        import zmq
        import zmq.asyncio
        import zmq.utils.monitor
    except ImportError as error:
        raise ImportError("KV events over ZeroMQ need pyzmq: pip install 'triton-distributed[kv]'") from error
    return zmq
