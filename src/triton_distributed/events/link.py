"""A publisher's connection to one subscribing process. It never waits; its queue is bounded, and drops the oldest."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable
from struct import Struct

from triton_distributed.errors import DecodeError
from triton_distributed.events.inbox import MAX_BYTES, MAX_EVENTS  # A link has the same bounds as an inbox.
from triton_distributed.system.fork import own

logger = logging.getLogger("triton_distributed.events")

PREFACE = b"TRDE\x01\n"
"""The first bytes of each connection. They identify the protocol and its version."""

HEAD = Struct(">QIH")
"""Header: bytes of data, events of this subject lost before it, bytes of the subject. Subject and data follow."""

GATHERED = 64 * 1024
"""Bytes joined for one write. A larger event is written from its own memory."""

SEND_BUFFER = 512 * 1024
"""Bytes of the send buffer, as for sessions; the kernel may cap it. A large one saves wake-ups in a burst."""


class Link:
    """The connection for events to one process.

    Args:
        sock: a connected, non-blocking socket; the link owns it from now on.
        where: the socket's path, for the log.
        on_lost: called once when the connection breaks, but not when it is closed here.

    The first event of a turn is written at once; the later events of the same turn are written together at its end.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, where: str, on_lost: Callable[[Link], None]
    ) -> None:
        own(sock)
        self._loop, self.sock, self._where, self._on_lost = loop, sock, where, on_lost
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._bytes = 0
        self._partial: deque[memoryview] = deque([memoryview(PREFACE)])  # Output that must be written completely.
        self._lost: dict[str, int] = {}  # Dropped events by subject, until the subject's next event is written.
        self._scheduled = False  # The queue will be written at the end of this turn.
        self._blocked = False  # The kernel's buffer is full; the loop calls when there is room.
        self._said = False
        self.closed = False

    def send(self, subject: str, data: bytes) -> None:
        """Write an event, or keep it until the socket accepts it."""
        waiting = self._waiting
        waiting.append((subject, data))
        self._bytes += len(data)
        if self._blocked:
            self._bound()
        elif not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._turn_over)
            self.flush()
        elif self._bytes >= GATHERED:
            self.flush()

    def _bound(self) -> None:
        waiting = self._waiting
        while len(waiting) > 1 and (self._bytes > MAX_BYTES or len(waiting) > MAX_EVENTS):
            subject, data = waiting.popleft()
            self._bytes -= len(data)
            self._lost[subject] = self._lost.get(subject, 0) + 1
            if not self._said:
                self._said = True
                logger.warning(
                    "the subscriber at %s does not read: the oldest of its %d waiting events are dropped "
                    "(logged once for this connection)",
                    self._where,
                    len(waiting) + 1,
                )

    def _turn_over(self) -> None:
        self._scheduled = False
        if not self.closed and not self._blocked:
            self.flush()

    @property
    def idle(self) -> bool:
        """Whether the kernel has accepted all output."""
        return not self._waiting and not self._partial

    def flush(self) -> None:
        """Write as much as the kernel accepts now."""
        partial = self._partial
        try:
            while partial or self._waiting:
                if not partial:
                    self._gather()
                while partial:
                    view = partial[0]
                    sent = self.sock.send(view)
                    if sent < len(view):
                        partial[0] = view[sent:]
                    else:
                        partial.popleft()
        except BlockingIOError:
            if not self._blocked:
                self._blocked = True
                self._loop.add_writer(self.sock, self._writable)
            self._bound()
            return
        except OSError:
            self.close()
            self._on_lost(self)
            return
        if self._blocked:
            self._blocked = False
            self._loop.remove_writer(self.sock)

    def _gather(self) -> None:
        pieces: list[bytes] = []
        size = 0
        waiting, lost = self._waiting, self._lost
        while waiting and size < GATHERED:
            subject, data = waiting.popleft()
            self._bytes -= len(data)
            name = subject.encode()
            pieces.append(HEAD.pack(len(data), lost.pop(subject, 0) if lost else 0, len(name)))
            pieces.append(name)
            if len(data) >= GATHERED:
                self._partial.append(memoryview(b"".join(pieces)))
                self._partial.append(memoryview(data))
                return
            pieces.append(data)
            size += len(data) + len(name)
        self._partial.append(memoryview(b"".join(pieces)))

    def _writable(self) -> None:
        self.flush()

    def close(self) -> None:
        """Close the connection and discard the waiting events."""
        if not self.closed:
            self.closed = True
            if self._blocked:
                self._loop.remove_writer(self.sock)
            self.sock.close()
            self._waiting.clear()
            self._partial.clear()


class FrameReader:
    """Decodes the bytes of a link into events.

    Args:
        max_bytes: the largest event, in bytes.
        deliver: called with the subject, the data, and the number of the subject's events lost before it.
    """

    def __init__(self, max_bytes: int, deliver: Callable[[str, bytes, int], None]) -> None:
        self._max_bytes, self._deliver = max_bytes, deliver
        self._greeted = False
        self._rest = b""  # Undecoded bytes: less than a header and a subject.
        self._chunks: list[bytes] = []  # Parts of an incomplete event, joined once so that a large one is copied once.
        self._missing = 0
        self._next = ("", 0)  # Subject and number of lost events of the incomplete event.

    def feed(self, data: bytes) -> None:
        """Deliver every complete event.

        Raises:
            DecodeError: the data was not written by a link.
        """
        if self._missing:
            missing = self._missing
            self._chunks.append(data if len(data) <= missing else data[:missing])
            self._missing = max(0, missing - len(data))
            if self._missing:
                return
            whole = b"".join(self._chunks)
            self._chunks.clear()
            self._deliver(self._next[0], whole, self._next[1])
            data = data[missing:]
        elif self._rest:
            data = self._rest + data
        at = 0
        if not self._greeted:
            if len(data) < len(PREFACE):
                self._rest = data
                return
            if not data.startswith(PREFACE):
                raise DecodeError(f"it begins with {data[: len(PREFACE)]!r}, not {PREFACE!r}")
            self._greeted = True
            at = len(PREFACE)
        size, head = len(data), HEAD.size
        while size - at >= head:
            length, lost, name = HEAD.unpack_from(data, at)
            if length > self._max_bytes:
                raise DecodeError(f"an event of {length:,} bytes is above the limit of {self._max_bytes:,}")
            start = at + head + name
            if size < start:
                break
            subject = data[at + head : start].decode(errors="replace")
            at = start + length
            if size < at:
                self._chunks.append(data[start:])
                self._missing = at - size
                self._next = (subject, lost)
                self._rest = b""
                return
            self._deliver(subject, data[start:at], lost)
        self._rest = data[at:]
