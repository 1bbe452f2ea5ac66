"""Who may have the loop, where peers send more than a turn of it takes.

One read can hold 18,000 frames, and uvloop reads 32 times in a row, so one peer that sends as fast as it can would keep
the loop for seconds. So a session serves a number of frames of what it has read, then waits here for its next turn, and
reads nothing more meanwhile: the rest waits in the kernel, and at the peer. All that wait share `TURN_S` of each turn.
"""

from __future__ import annotations

import asyncio
from collections import deque
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton_distributed.transport.session import Session

# Frames of one read that are served at once while nobody waits: more than 64 concurrent calls of a busy client bring.
FRAMES = 256
# And while somebody does: a client that behaves brings few at a time, and so is served at once still.
FEW_FRAMES = 8
FEW_HANDLERS = 8  # that begin in a turn for those that wait: what a handler does at first is not in `TURN_S`
# What all that wait have of each turn. A call takes three turns to be answered: its frame, its handler, its answer.
TURN_S = 0.000_5


class Turns:
    """The sessions of one loop that have read more than they may serve at once.

    Args:
        loop: the running loop.

    Attributes:
        frames: of one read that a session may serve before it waits here.
        begun: handlers that have begun in this turn, or in earlier ones.
    """

    __slots__ = ("_loop", "_turning", "_waiting", "begun", "frames")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[Session] = deque()  # each session at most once
        self._turning = False
        self.frames = FRAMES
        self.begun = 0

    def wait(self, session: Session) -> None:
        """`session` has more to serve: call its `take_turn` in a later turn."""
        if not self._waiting and not self._turning:
            self.frames = FEW_FRAMES
            self._loop.call_soon(self._turn)
        self._waiting.append(session)

    def _turn(self) -> None:
        waiting, end = self._waiting, perf_counter() + TURN_S
        self._turning = True
        self.begun = 0
        try:
            while waiting and self.begun < FEW_HANDLERS and perf_counter() < end:
                waiting.popleft().take_turn()
        finally:  # a session that raises must not stop the others
            self._turning = False
            if waiting:
                self._loop.call_soon(self._turn)
            else:
                self.frames = FRAMES
