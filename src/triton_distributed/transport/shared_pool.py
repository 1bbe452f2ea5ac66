"""The shared memory that a runtime has for what it sends: segments that stay warm, up to a limit.

A new segment costs more than the copy into it, because the kernel has to make and clear each page. So a segment is used
again, by any session, until none has needed it for `IDLE_S`.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Protocol

from triton_distributed.system.shared_memory import STEP, SUPPORTED, Segment, available_bytes, mappings

if TYPE_CHECKING:
    from triton_distributed.system.mapping import Mapping

IDLE_S = 10.0
"""Seconds after which an unused segment is given back: longer than the pauses of a busy program."""
SHARE = 4
"""A new segment takes at most this part, one in four, of the memory that is available."""
LOOSE = 4
"""A segment that is up to this many times as large as the buffer is used before a new one is made."""


class User(Protocol):
    """A session that knows segments of the pool."""

    def withdraw(self, segment: int) -> None:
        """Tell the peer that a segment is gone."""


class Slot:
    """One segment of the pool.

    Attributes:
        segment: the memory.
        users: sessions that have offered it to their peers.
        since: when it was last used, in seconds of the loop's clock.
        holds: number of processes that use its content: the peer, and this one if the peer has sent it back.
        mapping: the memory as this process reads it, once the peer has sent it back.
        dropped: the pool has given it up.
    """

    __slots__ = ("dropped", "holds", "mapping", "segment", "since", "users")

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.users: set[User] = set()
        self.since = 0.0
        self.holds = 0
        self.mapping: Mapping | None = None
        self.dropped = False

    def read(self) -> Mapping:
        """Return the memory as this process reads it.

        Raises:
            Refused: it cannot be mapped.
        """
        segment = self.segment
        if self.mapping is None:
            self.mapping = mappings().Mapping(os.getpid(), segment.fileno(), segment.size, segment.cookie)
        self.mapping = self.mapping.fresh()
        return self.mapping


class SharedPool:
    """The segments of one runtime.

    Args:
        loop: the running loop.
        limit: bytes of all segments together; 0 for none.

    Attributes:
        bytes: bytes of all segments: free, being filled, and lent.
        limit: see above.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        self._loop = loop
        self.limit = limit if SUPPORTED else 0
        self.bytes = 0
        self._free: list[Slot] = []  # least recently used first
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def take(self, size: int, user: User) -> Slot | None:
        """Return a slot for `size` bytes, preferably one that `user` knows; None if there is no memory for it."""
        fits = [each for each in self._free if each.segment.size >= size]
        best = min(fits, key=lambda each: (user not in each.users, each.segment.size), default=None)
        step = max(STEP // 16, 1 << max(0, size.bit_length() - 3))
        wanted = size + -size % step  # Few sizes, so that slots are used again; at most a quarter too large.
        if best is not None and (best.segment.size <= LOOSE * size or not self._may_grow(wanted)):
            self._free.remove(best)
            return best
        return await self._grow(wanted) if self._may_grow(wanted) else None

    def _may_grow(self, size: int) -> bool:
        free = sum(each.segment.size for each in self._free)
        return not self._closed and self.bytes - free + size <= self.limit

    async def _grow(self, size: int) -> Slot | None:
        while self.bytes + size > self.limit:
            self.drop(self._free.pop(0))
        if size > available_bytes() // SHARE:
            return None
        self.bytes += size
        try:
            segment = Segment(size)
            for _ in segment.make():
                await asyncio.sleep(0)  # Other streams must not wait for all the pages.
        except OSError:
            self.bytes -= size
            return None
        except BaseException:
            self.bytes -= size
            raise
        return Slot(segment)

    def release(self, slot: Slot) -> None:
        """Note that one process uses a slot's content no more."""
        slot.holds -= 1
        if not slot.holds and not slot.dropped:
            self.give(slot)

    def give(self, slot: Slot) -> None:
        """Take back a slot whose content no process reads any more."""
        if self._closed:
            self.drop(slot)
            return
        slot.since = self._loop.time()
        self._free.append(slot)
        if self._timer is None:
            self._timer = self._loop.call_later(IDLE_S, self._sweep)

    def drop(self, slot: Slot) -> None:
        """Give up a slot. Its memory is never written again: another process may read it."""
        if slot.dropped:
            return
        slot.dropped = True
        for user in tuple(slot.users):
            user.withdraw(slot.segment.id)
        self.bytes -= slot.segment.size
        slot.segment.close()

    def _sweep(self) -> None:
        """Give back what has not been used for long."""
        now = self._loop.time()
        while self._free and now - self._free[0].since >= IDLE_S:
            self.drop(self._free.pop(0))
        self._timer = None
        if self._free:
            self._timer = self._loop.call_later(IDLE_S - (now - self._free[0].since), self._sweep)

    def close(self) -> None:
        """Give back all free slots. Those that are lent follow when their sessions end."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._free:
            self.drop(self._free.pop())
