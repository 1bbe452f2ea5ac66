"""The router of one model: the index, the bookings and the policy, and the requests that it holds. Pure.

A request goes to the worker that the policy chooses. It leaves the router as soon as that worker has less than
`AHEAD_S` of prefill booked; until then the router holds it, and chooses anew each time. So the choice is made as late
as possible, with what the caches hold then. Held requests leave in the order of their response ratio: the longer a
request waits, and the shorter its prefill is, the sooner (HRRN: Brinch Hansen, Operating System Principles, 1973).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from triton_distributed.llm.routing.bookings import Booking, Work
from triton_distributed.llm.routing.index import MAX_ENTRIES, PrefixIndex
from triton_distributed.llm.routing.speed import PrefillSpeed
from triton_distributed.llm.routing.view import Candidate, Decision, Mode, Question, RoutingPolicy, Worker
from triton_distributed.names import Instance

AHEAD_S = 1.0
"""Seconds of prefill that a worker has booked at most when a further request is sent to it."""

LOOK = 32
"""Held requests that are looked at for the next one to leave."""


class KnownWorker:
    """What the router knows of a worker.

    Attributes:
        instance: its record in discovery.
        work: what it has to do.
        speed: how long a prefill takes.
        mode: how its cache is known.
        kv_used: the part of its KV cache that requests hold.
    """

    __slots__ = ("instance", "kv_used", "mode", "speed", "work", "worker")

    def __init__(self, worker: Worker, instance: Instance) -> None:
        self.worker, self.instance = worker, instance
        self.work, self.speed = Work(), PrefillSpeed()
        self.mode: Mode = "off"
        self.kv_used = 0.0


class Router:
    """Chooses workers.

    Args:
        policy: chooses among candidates.
        name: the policy's name, for explanations.
        max_entries: the most keys of the index.
        ahead_s: seconds of prefill that a worker has booked at most when a further request is sent to it.
    """

    def __init__(
        self, policy: RoutingPolicy, name: str, *, max_entries: int = MAX_ENTRIES, ahead_s: float = AHEAD_S
    ) -> None:
        self.index: PrefixIndex[Worker] = PrefixIndex(max_entries)
        self.workers: dict[Worker, KnownWorker] = {}
        self._policy, self._name, self._ahead_s = policy, name, ahead_s
        self._held: dict[Question, float] = {}  # And the seconds that its prefill takes, as last estimated.

    @property
    def held(self) -> int:
        """Requests that the router holds."""
        return len(self._held)

    def add(self, worker: Worker, instance: Instance) -> KnownWorker:
        """Add a worker, or return the known one."""
        found = self.workers.get(worker)
        if found is None:
            found = self.workers[worker] = KnownWorker(worker, instance)
            self.index.add(worker)
        return found

    def remove(self, worker: Worker) -> None:
        """Forget a worker. Bookings there end on their own. Nothing happens if it is unknown."""
        if self.workers.pop(worker, None) is not None:
            self.index.remove(worker)

    def weigh(self, question: Question, among: Iterable[Worker] | None = None) -> Decision | None:
        """Let the policy choose now. Nothing is booked.

        Args:
            question: the request.
            among: the workers that may be chosen, of which unknown ones are passed over; None for all.

        Returns:
            The decision; None if there is no such worker.
        """
        workers = self.workers
        keys, size, tokens = question.keys, question.block_tokens, question.tokens
        depths = self.index.depths(keys) if keys else {}
        candidates = []
        for worker in workers if among is None else among:
            known = workers.get(worker)
            if known is None:
                continue
            work, speed = known.work, known.speed
            depth = depths.get(worker, 0)
            promised = work.promised_depth(keys, depth)
            # The last token is computed in any case: the first output follows from it.
            counted = min(promised * size, tokens - 1)
            prefill_s = speed.seconds(tokens - counted)
            candidates.append(
                Candidate(
                    worker=worker,
                    instance=known.instance,
                    cached_tokens=min(depth * size, tokens - 1),
                    promised_tokens=counted,
                    prefill_s=prefill_s,
                    saved_s=max(0.0, speed.seconds(tokens) - prefill_s) if counted else 0.0,
                    wait_s=work.wait_s,
                    waiting=len(work.waiting),
                    running=work.running,
                    kv_used=known.kv_used,
                    mode=known.mode,
                )
            )
        if not candidates:
            return None
        return Decision(chosen=self._policy(question, candidates), candidates=candidates, policy=self._name)

    def book(self, question: Question, decision: Decision, now: float) -> Booking:
        """Book the chosen worker. The caller tells the booking of the first output, and releases it at the end."""
        chosen = decision.chosen
        work = self.workers[chosen.worker].work
        return Booking(
            work, chosen.worker, question.tokens, chosen.promised_tokens, chosen.prefill_s, question.keys, now
        )

    def hold(self, question: Question) -> None:
        """Hold a request until `leaving` gives it, or `withdraw` is called."""
        self._held[question] = 0.0

    def withdraw(self, question: Question) -> None:
        """Do not hold a request any more. Nothing happens if it has left."""
        self._held.pop(question, None)

    def leaving(self, now: float, among: Sequence[Worker] | None = None) -> tuple[Question, Decision] | None:
        """The next held request whose worker has room, which leaves the router; None if there is none.

        Book it before the next call.
        """
        held = self._held
        if not held:
            return None
        if not any(known.work.wait_s < self._ahead_s for known in self.workers.values()):
            return None
        order = sorted(held.items(), key=lambda each: each[1] / (now - each[0].since + 1.0))
        for question, _ in order[:LOOK]:
            decision = self.weigh(question, among)
            if decision is None:
                return None
            chosen = decision.chosen
            held[question] = chosen.prefill_s
            if chosen.wait_s < self._ahead_s:
                del held[question]
                decision.held_s = now - question.since
                return question, decision
        return None

    def first_output(self, booking: Booking, now: float) -> None:
        """Note the first output of a booked request, and learn from it."""
        known = self.workers.get(booking.worker)
        if known is not None and booking.alone and booking.state == Booking.WAITING:
            known.speed.note(booking.tokens - booking.cached_tokens, now - booking.at)
        booking.first_output()
