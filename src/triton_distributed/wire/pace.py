"""How large the fragments of large messages may be: a small message must not wait long for one."""

from __future__ import annotations

from typing import Final

from triton_distributed.wire.frames import LARGE_FRAME, MAX_FRAME

# Right after another stream was used, a fragment has this many bytes: they are sent and read in about 50 µs.
SMALLEST_FRAGMENT: Final = 64 * 1024
# Without such use fragments grow again: each has the bytes of large messages since then, divided by this.
CALM: Final = 16


class Pace:
    """The fragments of one session, in both directions.

    Its methods take `opened`, the number of streams that both ends have opened so far.

    Attributes:
        largest: the largest fragment that the peer accepts, bytes.
        large_opened: how many of these streams began with a request in fragments: they are not other use.
        drained: how often pushed items were written.
        short: the send buffer of the socket is short.
    """

    __slots__ = ("_calm", "_used", "drained", "large_opened", "largest", "short")

    def __init__(self) -> None:
        self.largest = MAX_FRAME
        self.large_opened = 0
        self.drained = 0
        self.short = False
        self._used = 0  # other use, as counted at the last fragment
        self._calm = CALM * LARGE_FRAME  # bytes of fragments since then; a session begins calm

    def _calm_bytes(self, opened: int) -> int:
        used = opened - self.large_opened + self.drained
        if used != self._used:
            self._used = used
            self._calm = 0
        return self._calm

    def is_calm(self, opened: int) -> bool:
        """Return whether only large messages have been sent and received for a while."""
        return self._calm_bytes(opened) >= CALM * MAX_FRAME

    def next_fragment(self, opened: int, credit: int) -> int:
        """Return how many bytes the next fragment to send may have.

        Args:
            credit: the bytes that its stream may send, which a fragment exceeds by `MAX_FRAME` at most.
        """
        size = max(SMALLEST_FRAGMENT, min(self.largest, self._calm_bytes(opened) // CALM))
        if size > MAX_FRAME + credit:
            size = MAX_FRAME
        self._calm += size
        return size

    def received(self, size: int) -> None:
        """Note that a fragment of `size` bytes arrives."""
        self._calm += size
