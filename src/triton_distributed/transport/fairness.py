"""Who may have the loop, where peers send more than a turn of it takes.

One read can hold 18,000 frames, and uvloop reads 32 times in a row, so one peer that sends as fast as it can would keep
the loop for seconds. So a session serves some of what it has read, then waits here for its next turn, and reads nothing
more meanwhile: the rest waits in the kernel, and at the peer. All that wait share `TURN_S` of each turn, and what their
frames set off counts: the first steps of handlers, the ends of those that were cancelled, the writing of answers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sized
from time import perf_counter
from typing import Protocol

from triton_distributed.transport.stream import Stream

# What a session may do at once while nobody waits: more than a busy client brings, or little loss where it does.
FRAMES = 128  # of one read
AT_ONCE_S = 0.005  # of handlers' first steps: those of 64 calls, or a client that makes so many would be slowed down
READ_BYTES = 1 << 20  # in several reads
# And while somebody does: a client that behaves brings few at a time, and so is served at once still.
FEW_FRAMES = 8
FEW_BYTES = 128 * 1024
FEW_STREAMS = 32  # open ones: who has more is served after those that have not
LIGHT = 4  # times as many handlers may begin for the former, or one that once fell behind would stay there
READERS = 2  # that are let read again in a turn
CALM_S = 0.1  # seconds in which one that had more than FRAMES has few: what it reads next is more of the same
# What all that wait have of each turn. A call takes three turns to be answered: its frame, its handler, its answer.
TURN_S = 0.000_25
LEAST = 1 / 8  # of it, however much the frames set off
ENDED = 16  # streams of clients that are gone that are ended in one: the end of a handler takes some 30 µs
HANDLER_S = 0.000_07  # the first step of a handler, before one was measured
UNLIMITED = 1 << 62


class Waiter(Protocol):
    """A session that waits for its turn."""

    @property
    def streams(self) -> Sized:
        """The open streams."""

    def take_turn(self) -> None:
        """Serve some of what was read."""


class Turns:
    """The sessions of one loop that have read more than they may serve at once.

    Args:
        loop: the running loop.
        limited: False for a transport that cannot stop to read: everything is served at once.

    Attributes:
        frames: of one read that a session may serve before it waits here.
        read_bytes: that it may read.
        begun: handlers that have begun in this turn.
        readers: sessions that were let read again in this turn.
    """

    __slots__ = (
        "_at_once",
        "_budget_s",
        "_ending",
        "_ends",
        "_in_turn",
        "_light",
        "_loop",
        "_marked",
        "_served_s",
        "_turning",
        "_waiting",
        "begun",
        "frames",
        "read_bytes",
        "readers",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, limited: bool = True) -> None:
        self._loop = loop
        self._waiting: deque[Waiter] = deque()  # each session at most once, in one of these
        self._light: deque[Waiter] = deque()
        self._ending: deque[deque[Stream]] = deque()  # of each session that is gone; nothing more comes for them
        self._turning = self._ends = False  # a turn is to come
        self._marked = self._served_s = 0.0
        self._budget_s = TURN_S
        self._at_once, self._in_turn = int(AT_ONCE_S / HANDLER_S), int(TURN_S / HANDLER_S)  # handlers
        self.frames, self.read_bytes = FRAMES, READ_BYTES
        if not limited:
            self._at_once = self.frames = self.read_bytes = UNLIMITED
        self.begun = self.readers = 0

    @property
    def room(self) -> int:
        """How many handlers of one session may begin now."""
        return FEW_FRAMES if self.frames == FEW_FRAMES else self._at_once

    def wait(self, session: Waiter) -> None:
        """`session` has more to serve: call its `take_turn` in a later turn."""
        if not self._turning:
            self._turning = True
            self.frames, self.read_bytes = FEW_FRAMES, FEW_BYTES
            self.begun = 0  # what has begun before was not measured
            self._served_s = 0.0
            self._loop.call_soon(self._turn)
        (self._light if len(session.streams) <= FEW_STREAMS else self._waiting).append(session)

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

    def _mark(self) -> None:
        self._marked = perf_counter()

    def _turn(self) -> None:
        waiting, light, start = self._waiting, self._light, perf_counter()
        if self._served_s:
            behind_s = max(1e-9, start - self._marked)  # what the turn before set off ran between `_mark` and this
            self._budget_s = TURN_S * max(LEAST, self._served_s / (self._served_s + behind_s))
            if self.begun:
                self._at_once = max(1, int(AT_ONCE_S * self.begun / behind_s))
                self._in_turn = max(1, min(FEW_FRAMES, int(TURN_S * self.begun / behind_s)))
        self.begun = self.readers = 0
        self._loop.call_soon(self._mark)
        end = start + self._budget_s
        try:
            while light and self.begun < LIGHT * self._in_turn and self.readers < READERS and perf_counter() < end:
                light.popleft().take_turn()
            if waiting:  # one at least: those that come first are not to have it all
                waiting.popleft().take_turn()
            while waiting and self.begun < self._in_turn and self.readers < READERS and perf_counter() < end:
                waiting.popleft().take_turn()
        finally:  # a session that raises must not stop the others
            self._served_s = perf_counter() - start
            if waiting or light:
                self._loop.call_soon(self._turn)
            else:
                self._turning = False
                self.frames, self.read_bytes = FRAMES, READ_BYTES
