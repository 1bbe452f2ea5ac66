"""Flow control: how much a stream may have unread, and how that is shared between streams.

Each stream has its own credit in bytes, so a consumer that does not read stops its own producer and no other one. The
windows of all streams of a session come out of one budget: the more of the budget is promised, the smaller the window
of a new stream. So the memory that a session can be made to hold is bounded by

    session_window_bytes + open streams * SMALLEST_WINDOW + one message under way a stream

in the direction of responses. Requests that are streamed get the window of the hello, `window_bytes` each.
"""

from __future__ import annotations

# Each frame costs this many bytes of credit beside its payload: about what a received frame takes in objects.
FRAME_COST = 64
# Each item costs this many bytes of its stream's quota, so that a turn ends after 256 small items.
ITEM_COST = 256
# One stream may write this many bytes in a turn of the loop; then the other streams write.
TURN_BYTES = 64 * 1024
# All streams of a session together may make this many bytes in a turn, beside one item each.
MADE_BYTES = 4 * 1024 * 1024
# About this many bytes are gathered for one write, and a transport holds no more than the kernel did not take of them.
WRITE_BYTES = 256 * 1024
# No stream gets a smaller window, however little of the session's budget is left.
SMALLEST_WINDOW = 4096
# This many bytes of each stream are not counted in `ByteBudget`, so that a small request costs no count.
FREE_BYTES = 16 * 1024
# A stream counts this many bytes at once in `ByteBudget`, so that it seldom has to.
HELD_STEP = 64 * 1024
# A sender stops when its credit is used up, not before, so it may exceed the window by what it sends in one turn.
SLACK = 2 * TURN_BYTES + 2 * FRAME_COST + 256 * 1024


class ByteBudget:
    """What peers have sent and a process has in memory, for all streams that they opened: at most so many bytes.

    Windows bound a stream and not a process, because a peer may open many streams. So what a stream holds beyond
    `FREE_BYTES` is counted here: what was received and not read, messages that are not whole, the body of a request
    while it is served.

    Args:
        most: bytes; a stream that would hold more than is left is refused.
    """

    __slots__ = ("bytes", "most")

    def __init__(self, most: int) -> None:
        self.most = most
        self.bytes = 0

    def take(self, count: int) -> bool:
        """Count more bytes. False: they would be too many, and were not counted."""
        if self.bytes + count > self.most:
            return False
        self.bytes += count
        return True


class WindowBudget:
    """Shares the bytes that a session may have unread between its streams.

    Args:
        window: what one stream gets while there is plenty, bytes.
        total: the budget of the session, bytes.
    """

    __slots__ = ("_left", "_window", "total")

    def __init__(self, window: int, total: int) -> None:
        self._window = window
        self._left = self.total = total

    @property
    def promised(self) -> int:
        """Bytes that the windows of open streams have together."""
        return self.total - self._left

    def reserve(self) -> int:
        """The window of a new stream: a sixteenth of what is left, at most `window`, at least `SMALLEST_WINDOW`."""
        window = self._left >> 4
        if window > self._window:
            window = self._window
        elif window < SMALLEST_WINDOW:
            window = SMALLEST_WINDOW
        self._left -= window
        return window

    def release(self, window: int) -> None:
        """A stream that had `window` is over."""
        self._left += window
