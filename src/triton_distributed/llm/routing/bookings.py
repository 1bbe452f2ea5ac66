"""What each worker has to do, in seconds of prefill. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from triton_distributed.llm.routing.view import Worker


class Booking:
    """One request at one worker, from the choice to the end of its answer.

    Attributes:
        worker: the worker.
        tokens: of the prompt.
        cached_tokens: those that were thought to need no computing.
        prefill_s: seconds for the others.
        keys: of the prompt's blocks, which the worker will hold when its prefill is done.
        at: when it was booked, on the router's clock.
        alone: no other prefill was booked at the worker from the booking to the first output.
    """

    __slots__ = ("_work", "alone", "at", "cached_tokens", "keys", "prefill_s", "state", "tokens", "worker")

    WAITING, RUNNING, ENDED = range(3)

    def __init__(
        self,
        work: Work,
        worker: Worker,
        tokens: int,
        cached_tokens: int,
        prefill_s: float,
        keys: Sequence[int],
        at: float,
    ) -> None:
        self._work, self.worker = work, worker
        self.tokens, self.cached_tokens, self.prefill_s, self.keys, self.at = tokens, cached_tokens, prefill_s, keys, at
        self.alone = not work.waiting
        self.state = Booking.WAITING
        for other in work.waiting:
            other.alone = False
        work.waiting[self] = None
        work.wait_s += prefill_s
        promised = work.promised
        for key in keys:
            promised[key] = promised.get(key, 0) + 1

    def first_output(self) -> None:
        """Note that the prefill is done. Nothing happens at a second call."""
        if self.state == Booking.WAITING:
            self._computed()
            self.state = Booking.RUNNING
            self._work.running += 1

    def release(self) -> None:
        """Note that the answer has ended, whatever way. Nothing happens at a second call."""
        if self.state == Booking.WAITING:
            self._computed()
        elif self.state == Booking.RUNNING:
            self._work.running -= 1
        self.state = Booking.ENDED

    def _computed(self) -> None:
        work = self._work
        del work.waiting[self]
        work.wait_s = work.wait_s - self.prefill_s if work.waiting else 0.0  # No sum of rounding errors stays.
        promised = work.promised
        for key in self.keys:
            count = promised[key] - 1
            if count:
                promised[key] = count
            else:
                del promised[key]


class Work:
    """What one worker has to do.

    Attributes:
        waiting: bookings without a first output, in their order.
        running: how many bookings have one.
        wait_s: seconds of prefill of those that wait.
        promised: keys of blocks that the worker will hold when these are done, and for how many of them.
    """

    __slots__ = ("promised", "running", "wait_s", "waiting")

    def __init__(self) -> None:
        self.waiting: dict[Booking, None] = {}
        self.running = 0
        self.wait_s = 0.0
        self.promised: dict[int, int] = {}

    def promised_depth(self, keys: Sequence[int], depth: int) -> int:
        """How many of the first blocks the worker will hold, if it holds `depth` of them now."""
        promised = self.promised
        if not promised or depth >= len(keys) or keys[depth] not in promised:
            return depth
        low, high = depth + 1, len(keys)
        while low < high:
            middle = (low + high) >> 1
            if keys[middle] in promised:
                low = middle + 1
            else:
                high = middle
        return low
