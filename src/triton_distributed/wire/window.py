"""Flow control: how many unread bytes a stream may have, and how streams share a budget.

Each stream has its own credit in bytes, so a consumer that does not read stops only its own producer. The windows of
all streams of a session come from one budget: the more of it is promised, the smaller the window of a new stream. So
the memory that a peer can make a session hold is bounded by

    session_window_bytes + open streams * SMALLEST_WINDOW + one message under way per stream

in the direction of responses. A two-way stream's request gets the window of the hello, `window_bytes` each.
"""

from __future__ import annotations

from typing import Final

# Each frame costs this many bytes of credit besides its payload: about the memory of a received frame's objects.
FRAME_COST: Final = 64
# Each item costs this many bytes of its stream's quota, so that a turn ends after 256 small items.
ITEM_COST: Final = 256
# One stream may write this many bytes in a turn of the loop; then other streams write.
TURN_BYTES: Final = 64 * 1024
# All streams of a session together may produce this many bytes in a turn, plus one item each.
MADE_BYTES: Final = 4 * 1024 * 1024
# One write gathers about this many bytes, and a transport buffers only what the kernel did not take of them.
WRITE_BYTES: Final = 256 * 1024
# Each stream's window has at least this many bytes, however little of the session's budget is left.
SMALLEST_WINDOW: Final = 4096
# The first bytes of each stream, up to this many, are not counted in `ByteBudget`, so small requests cost no count.
FREE_BYTES: Final = 16 * 1024
# A stream counts its bytes in `ByteBudget` in steps of this size, to keep accounting rare.
HELD_STEP: Final = 64 * 1024
# A message with buffers in shared memory costs this many bytes of credit more. They are as good as here already; so a
# sender with a usual window waits after each until it is read.
LENT_COST: Final = 256 * 1024
# A sender stops only after its credit is used up, so it may exceed the window by what it sends in one turn: its items,
# then the first frame of a message with a buffer in shared memory, then the end of the stream, which needs no credit.
SLACK: Final = 2 * TURN_BYTES + 256 * 1024 + LENT_COST + 3 * FRAME_COST


class ByteBudget:
    """Bounds the memory of a process for all streams that peers opened.

    Windows bound a stream and not a process, because a peer may open many streams. So the bytes of a stream beyond
    `FREE_BYTES` are counted here: received and not read, incomplete messages, the body of a request while it is served.

    Args:
        most: the limit in bytes; a stream that would exceed it is refused.
    """

    __slots__ = ("bytes", "most")

    def __init__(self, most: int) -> None:
        self.most = most
        self.bytes = 0

    def take(self, count: int) -> bool:
        """Count more bytes. False: they would exceed the limit, and were not counted."""
        if self.bytes + count > self.most:
            return False
        self.bytes += count
        return True


class WindowBudget:
    """Divides the bytes that a session may have unread among its streams.

    Args:
        window: bytes for one stream while most of the budget is left.
        total: the budget of the session in bytes.
    """

    __slots__ = ("_left", "_window", "total")

    def __init__(self, window: int, total: int) -> None:
        self._window = window
        self._left = self.total = total

    @property
    def promised(self) -> int:
        """Sum of the windows of open streams in bytes."""
        return self.total - self._left

    def reserve(self) -> int:
        """Take the window of a new stream: 1/16 of what is left, at most `window`, at least `SMALLEST_WINDOW`."""
        window = self._left >> 4
        if window > self._window:
            window = self._window
        elif window < SMALLEST_WINDOW:
            window = SMALLEST_WINDOW
        self._left -= window
        return window

    def release(self, window: int) -> None:
        """Give back the window of a stream that ended."""
        self._left += window
