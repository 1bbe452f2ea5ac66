"""Both ends of a session in one process, without a socket: for tests and for `memory` discovery."""

from __future__ import annotations

import asyncio
import contextvars
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from triton_distributed.system.protocol import StreamProtocol

# At most about this many bytes are delivered at once, as with a socket.
READ_BYTES = 256 * 1024
# With more than this many bytes under way in one direction, the writer is paused, as with a socket's buffer.
HIGH_WATER = 256 * 1024


class MemoryTransport(asyncio.Transport):
    """One end of a pair: the other end receives what is written here in a later turn of the loop."""

    reads_in_place = False

    def __init__(self, loop: asyncio.AbstractEventLoop, protocol: StreamProtocol) -> None:
        super().__init__()
        self._loop = loop
        self._protocol = protocol
        self._peer: MemoryTransport | None = None
        self._pending: deque[bytes] = deque()  # written here, not yet received there; bounded by pausing the writer
        self._size = 0
        self._variables = contextvars.Context()  # The receiver does not run in the context of the writer.
        self._high = HIGH_WATER
        self._paused = self._closing = self._lost = self._moving = False

    @classmethod
    def pair(
        cls, loop: asyncio.AbstractEventLoop, here: StreamProtocol, there: StreamProtocol
    ) -> tuple[MemoryTransport, MemoryTransport]:
        """Connect two protocols to each other; their `connection_made` is called in a later turn of the loop."""
        one, other = cls(loop, here), cls(loop, there)
        one._peer, other._peer = other, one
        loop.call_soon(here.connection_made, one)
        loop.call_soon(there.connection_made, other)
        return one, other

    def write(self, data: Any) -> None:
        if self._closing or self._lost or not data:
            return
        self._pending.append(bytes(data))
        self._size += len(data)
        self._move()
        if self._size > self._high and not self._paused:
            self._paused = True
            self._protocol.pause_writing()

    def _move(self) -> None:
        if not self._moving:
            self._moving = True
            self._loop.call_soon(self._deliver, context=self._variables)

    def _deliver(self) -> None:
        self._moving = False
        peer = self._peer
        if peer is None or peer._lost or peer._closing:
            self._pending.clear()
            self._size = 0
            if self._closing:
                self._lose(None)
            return
        taken: list[bytes] = []
        size = 0
        while self._pending and size < READ_BYTES:
            taken.append(self._pending.popleft())
            size += len(taken[-1])
        self._size -= size
        if taken:
            peer._protocol.data_received(b"".join(taken))
        if self._pending:
            self._move()
        elif self._closing:
            self._lose(None)
            return
        if self._paused and self._size <= self._high:
            self._paused = False
            self._protocol.resume_writing()

    def _lose(self, error: Exception | None) -> None:
        if self._lost:
            return
        self._lost = True
        self._loop.call_soon(self._protocol.connection_lost, error)
        if self._peer is not None and not self._peer._lost:
            self._loop.call_soon(self._peer._lose, None)

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._move()

    def abort(self) -> None:
        self._closing = True
        self._pending.clear()
        self._lose(None)

    def is_closing(self) -> bool:
        return self._closing or self._lost

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = max(high or 0, HIGH_WATER)

    def get_write_buffer_size(self) -> int:
        return self._size

    def get_protocol(self) -> asyncio.BaseProtocol:
        return cast(asyncio.BaseProtocol, self._protocol)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        raise NotImplementedError("a memory transport keeps its protocol: it does not read in place")

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None:
        raise NotImplementedError("sessions always read: flow control is by credit")

    def resume_reading(self) -> None:
        raise NotImplementedError("sessions always read: flow control is by credit")


class MemoryNetwork:
    """Listeners by name, within one event loop."""

    def __init__(self) -> None:
        self._listening: dict[str, Callable[[], StreamProtocol]] = {}

    def listen(self, name: str, factory: Callable[[], StreamProtocol]) -> Callable[[], None]:
        """Listen on `name`; the returned function stops that."""
        if name in self._listening:
            raise OSError(f"memory://{name} has a listener already")
        self._listening[name] = factory
        return lambda: self._listening.pop(name, None) and None

    def connect(self, loop: asyncio.AbstractEventLoop, name: str, protocol: StreamProtocol) -> None:
        """Connect `protocol` to the listener on `name`.

        Raises:
            ConnectionRefusedError: nothing listens on it.
        """
        factory = self._listening.get(name)
        if factory is None:
            raise ConnectionRefusedError(f"nothing listens on memory://{name}")
        MemoryTransport.pair(loop, protocol, factory())


# Each loop has one network, so that runtimes on one loop reach each other, and loops of other threads do not interfere.
_networks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, MemoryNetwork] = weakref.WeakKeyDictionary()


def network_of(loop: asyncio.AbstractEventLoop) -> MemoryNetwork:
    """Return the memory network of this loop."""
    return _networks.setdefault(loop, MemoryNetwork())
