"""Whose turn it is, where peers send more than one turn of the loop can serve.

One read can hold 18,000 frames, and uvloop reads 32 times in a row, so a peer that sends as fast as it can would keep
the loop for seconds. So a session serves one quantum of what it has read. Where there is more, it reads nothing and
goes to the back of one queue, of which each turn of the loop serves one session. The rest waits in the kernel and at
the peer. While sessions wait, the quantum of all is smaller: a client that behaves brings few frames at a time, and is
served at once still.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from triton_distributed.transport.stream import Stream

# A session may serve this many frames at once while no session waits. A busy client brings about as many, and the first
# steps of this many handlers take some 5 ms.
FRAMES = 64
# A session may read this many bytes at once, in several reads, while no session waits.
READ_BYTES = 1 << 20
# While sessions wait, both are divided by this.
CROWDED = 8
# A turn ends this many streams of clients that are gone: the end of a handler takes some 30 µs.
ENDED = 16
UNLIMITED = 1 << 62  # more than one read can hold


class Waiter(Protocol):
    """A session that waits for its turn."""

    def take_turn(self) -> None:
        """Serve one quantum of what was read."""


class FairShare:
    """The sessions of one loop that have read more than they may serve at once.

    Args:
        loop: the running loop.
        limited: False for a transport that cannot stop to read: everything is served at once.

    Attributes:
        frames: how many frames a session may serve before it waits; at most as many handlers begin.
        read_bytes: how many bytes a session may read before it waits.
    """

    __slots__ = ("_ending", "_ends", "_loop", "_most", "_turning", "_waiting", "frames", "read_bytes")

    def __init__(self, loop: asyncio.AbstractEventLoop, limited: bool = True) -> None:
        self._loop = loop
        self._waiting: deque[Waiter] = deque()  # each session at most once
        self._ending: deque[deque[Stream]] = deque()  # one a session that is gone; nothing is added to it
        self._turning = self._ends = False  # a turn of the queue, or of the ends, is to come
        self._most = (FRAMES, READ_BYTES) if limited else (UNLIMITED, UNLIMITED)
        self.frames, self.read_bytes = self._most

    def unlimited(self) -> FairShare:
        """For a session on the same loop whose transport cannot stop to read."""
        return FairShare(self._loop, limited=False)

    def wait(self, session: Waiter) -> None:
        """`session` has more to serve: call its `take_turn` in a later turn."""
        self._waiting.append(session)
        if not self._turning:
            self._turning = True
            frames, read_bytes = self._most
            self.frames, self.read_bytes = frames // CROWDED, read_bytes // CROWDED
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        try:
            self._waiting.popleft().take_turn()
        finally:  # a session that raises must not stop the others
            if self._waiting:
                self._loop.call_soon(self._turn)
            else:
                self._turning = False
                self.frames, self.read_bytes = self._most

    def end(self, streams: list[Stream]) -> None:
        """Tell these streams, whose session is gone, that they are over: some now, the others in later turns."""
        if streams:
            self._ending.append(deque(streams))
        if not self._ends:
            self._end()

    def _end(self) -> None:
        ending = self._ending
        self._ends = bool(ending)
        if ending:
            self._loop.call_soon(self._end)
        for _ in range(ENDED):
            if not ending:
                break
            streams = ending.popleft()
            stream = streams.popleft()
            if streams:
                ending.append(streams)
            stream.on_closed()
