"""Fair shares of the loop among sessions, for peers that send more than one turn can serve.

One read can hold 18,000 frames, and uvloop reads 32 times in a row, so a peer that floods the worker could occupy the
loop for seconds. So a session serves one quantum of what it has read. If there is more, it stops reading and goes to
the back of a queue, from which each turn of the loop serves one session. The rest waits in the kernel and at the peer.
While sessions wait, the quantum of all is smaller: a client that behaves sends few frames at a time, and is still
served at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from triton_distributed.compiled import mypyc_attr
from triton_distributed.transport.stream import Stream

# A session may serve this many frames at once while no session waits. A busy client sends about as many, and the first
# steps of as many handlers take about 5 ms.
FRAMES = 64
# A session may read this many bytes at once, in several reads, while no session waits.
READ_BYTES = 1 << 20
# A session may read this many bytes of large messages at once while its other streams are in use.
BUSY_BYTES = 64 * 1024
# While sessions wait, `FRAMES` and `READ_BYTES` are divided by this.
CROWDED = 8
# A turn ends this many streams of disconnected clients: the end of a handler takes about 30 µs.
ENDED = 16
UNLIMITED = 1 << 62  # more frames than one read can hold


class Waiter(Protocol):
    """A session that waits for its turn."""

    def take_turn(self) -> None:
        """Serve one quantum of the bytes read."""


@mypyc_attr(allow_interpreted_subclasses=True)
class FairShare:
    """The sessions of one loop that have read more than they may serve at once.

    Args:
        loop: the running loop.
        limited: False for a transport that cannot stop reading: everything is served at once.

    Attributes:
        frames: number of frames that a session may serve before it waits; at most as many handlers begin.
        read_bytes: number of bytes that a session may read before it waits.
        received, sent: bytes that all sessions of the share have read and written so far.
    """

    __slots__ = (
        "_ending", "_ends", "_loop", "_most", "_turning", "_waiting", "frames", "read_bytes", "received", "sent",
    )  # fmt: skip

    def __init__(self, loop: asyncio.AbstractEventLoop, limited: bool = True) -> None:
        self._loop = loop
        self._waiting: deque[Waiter] = deque()  # each session at most once
        self._ending: deque[deque[Stream]] = deque()  # one for each lost session; nothing is added to it
        self._turning = self._ends = False  # `_turn` or `_end` is scheduled
        self._most = (FRAMES, READ_BYTES) if limited else (UNLIMITED, UNLIMITED)
        self.frames, self.read_bytes = self._most
        self.received = self.sent = 0

    def unlimited(self) -> FairShare:
        """Return a share for a session on the same loop whose transport cannot stop reading."""
        return FairShare(self._loop, limited=False)

    def wait(self, session: Waiter) -> None:
        """Queue `session`, which has more to serve: its `take_turn` is called in a later turn."""
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
        """Close these streams, whose session was lost: some now, the others in later turns."""
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
