"""What each worker has to do, in seconds of prefill. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from triton_distributed.llm.routing.view import Worker
from triton_distributed.routing.load import LoadBook

TOGETHER_S = 2e-3
"""First outputs that come within this time belong to one step of the engine."""

STEP = 4
"""One of so many keys of a booked prompt is kept. All of them take longer to keep than the choice takes."""


class Booking:
    """One request at one worker, from the choice to the end of its answer.

    One whose prompt another worker computes is `RUNNING` from the beginning.

    Attributes:
        worker: the worker.
        tokens: of the prompt.
        cached_tokens: those that were thought to need no computing.
        prefill_s: seconds for the others.
        keys: of the prompt's blocks, which the worker will hold when its prefill is done.
        at: when it was booked, on the router's clock.
        state: `WAITING` for its first output, `RUNNING` after it, or `ENDED`.
    """

    __slots__ = ("_work", "at", "cached_tokens", "keys", "prefill_s", "state", "tokens", "worker")

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
        computed: bool = False,
    ) -> None:
        self._work, self.worker = work, worker
        self.tokens, self.cached_tokens, self.prefill_s, self.keys, self.at = tokens, cached_tokens, prefill_s, keys, at
        work.active_tokens += tokens
        if work.load is not None:
            work.load.acquire(worker[0])
        if (active := work.active) is not None:
            for key in keys:
                active[key] = active.get(key, 0) + 1
        if computed:
            self.state = Booking.RUNNING
            work.running += 1
            return
        self.state = Booking.WAITING
        work.waiting[self] = None
        work.wait_s += prefill_s
        work.waiting_tokens += tokens - cached_tokens
        if keys:
            promised = work.promised
            for key in keys[STEP - 1 :: STEP]:
                promised[key] = promised.get(key, 0) + 1

    def first_output(self, now: float, cached_tokens: int | None = None) -> tuple[int, float] | None:
        """Note that the prefill is done. Nothing happens at a second call.

        Args:
            now: seconds, on the router's clock.
            cached_tokens: prompt tokens that were not computed; None if they are those that were thought so.

        Returns:
            Tokens that the worker has computed, and the seconds for that; None if this call measured nothing.
        """
        if self.state != Booking.WAITING:
            return None
        self._computed()
        self.state = Booking.RUNNING
        self._work.running += 1
        if cached_tokens is not None:
            self.cached_tokens = cached_tokens
        return self._work.measure(self, now)

    def release(self) -> None:
        """Note that the answer has ended, whatever way. Nothing happens at a second call."""
        if self.state == Booking.ENDED:
            return
        work = self._work
        if self.state == Booking.WAITING:
            self._computed()
            work.cut()
        else:
            work.running -= 1
        work.active_tokens -= self.tokens
        if work.load is not None:
            work.load.release(self.worker[0])
        if work.active is not None:
            _take_off(work.active, self.keys)
        self.state = Booking.ENDED

    def _computed(self) -> None:
        work = self._work
        del work.waiting[self]
        work.freed = True
        work.waiting_tokens -= self.tokens - self.cached_tokens
        work.wait_s = work.wait_s - self.prefill_s if work.waiting else 0.0  # No sum of rounding errors stays.
        if self.keys:
            _take_off(work.promised, self.keys[STEP - 1 :: STEP])


def _take_off(counts: dict[int, int], keys: Iterable[int]) -> None:
    for key in keys:
        count = counts[key] - 1
        if count:
            counts[key] = count
        else:
            del counts[key]


class Work:
    """What one worker has to do.

    Args:
        load: counts the bookings of each instance; None if the policy does not look at it.
        counts: keep the blocks of all bookings, for a policy with `counts_blocks`.

    Attributes:
        waiting: bookings without a first output, in their order.
        running: how many bookings have one.
        waiting_tokens: prompt tokens that those have to compute that wait.
        active_tokens: prompt tokens of all that wait or run.
        wait_s: seconds of prefill of those that wait, each counted whole.
        promised: keys of blocks that the worker will hold when these are done, and for how many of them; each fourth.
        active: keys of the blocks of all that wait or run, and for how many of them; None if they are not kept.
        freed: a booking has left `waiting`; the reader sets it to False.
    """

    __slots__ = (
        "_begun",
        "_clear",
        "_cut",
        "_done_at",
        "_tokens",
        "active",
        "active_tokens",
        "freed",
        "load",
        "promised",
        "running",
        "wait_s",
        "waiting",
        "waiting_tokens",
    )

    def __init__(self, load: LoadBook | None, counts: bool = False) -> None:
        self.load = load
        self.active: dict[int, int] | None = {} if counts else None
        self.waiting: dict[Booking, None] = {}
        self.running = 0
        self.waiting_tokens = self.active_tokens = 0
        self.wait_s = 0.0
        self.promised: dict[int, int] = {}
        self.freed = False
        # The last first outputs that came together: when the worker began with them, when they came, and their tokens.
        self._begun, self._done_at, self._tokens = 0.0, 0.0, 0
        self._clear, self._cut = True, False  # They are measured; a prefill was cut short since they came.

    def expected_wait_s(self, now: float) -> float:
        """Seconds until the worker has done the prefills that wait.

        What it has done of the first one is taken off. If that is late, it is expected to be late by as much again: so
        nothing waits for ever for a worker that stalls.

        Args:
            now: seconds, on the router's clock.
        """
        for first in self.waiting:
            spent = now - max(self._done_at, first.at)
            return self.wait_s - first.prefill_s + abs(first.prefill_s - spent)
        return 0.0

    def measure(self, booking: Booking, now: float) -> tuple[int, float] | None:
        """Note that a prefill is done, and return what is known now of those before: their tokens and seconds.

        A worker computes one prompt after the other, or several in one step. So a prefill begins when the one before is
        done, and those whose first outputs come together are one.
        """
        measured = None
        if now - self._done_at > TOGETHER_S:
            if self._tokens:
                measured = self._tokens, self._done_at - self._begun
            self._begun, self._tokens = max(self._done_at, booking.at), 0
            self._clear, self._cut = not self._cut, False
        self._done_at = now
        if self._clear:
            self._tokens += booking.tokens - booking.cached_tokens
        return measured

    def cut(self) -> None:
        """Note that a prefill has ended without a first output: what comes next began at an unknown time."""
        self._cut = True

    def promised_depth(self, keys: Sequence[int], depth: int) -> int:
        """How many of the first blocks the worker will hold, if it holds `depth` of them now. Rounded down."""
        promised = self.promised
        low, high = depth // STEP, len(keys) // STEP
        if not promised or low >= high or keys[low * STEP + STEP - 1] not in promised:
            return depth
        low += 1
        while low < high:
            middle = (low + high) >> 1
            if keys[middle * STEP + STEP - 1] in promised:
                low = middle + 1
            else:
                high = middle
        return low * STEP

    def blocks_with(self, keys: Sequence[int]) -> int:
        """How many blocks there would be with one more request, each counted once. They must be kept (`active`)."""
        active = self.active
        assert active is not None
        low, high = 0, len(keys)
        while low < high:  # A request has all blocks before each of its own.
            middle = (low + high) >> 1
            if keys[middle] in active:
                low = middle + 1
            else:
                high = middle
        return len(active) + len(keys) - low
