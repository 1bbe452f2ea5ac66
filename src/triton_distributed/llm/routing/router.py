"""The router of one model: the index, the bookings and the policy, and the requests that it holds. Pure.

A request goes to the worker that the policy chooses. With a policy that holds, it leaves the router as soon as that
worker has less than `ahead_s` of prefill booked; until then the router holds it, and chooses anew. So the choice is
made as late as possible, with what the caches hold then. A worker that has stalled has no room, since what was booked
there is not done.

Held requests leave in one order: by the time at which they came plus `PASSED` times their prefill. So shorter prefills
go before longer ones, and each request is passed only by those that come within a bounded time. The order is kept
strictly: a worker that could take a longer request is left free while several before it wait for other workers, because
the memory that the longer one would take is missed by the shorter ones that come next.

To weigh each held request at each change would cost milliseconds. So only the first few are looked at. Those that
wait for a busy worker are passed over without being weighed again, for a short time.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from math import inf

from triton_distributed.llm.routing.bookings import Booking, Work
from triton_distributed.llm.routing.index import MAX_ENTRIES, PrefixIndex
from triton_distributed.llm.routing.policies.kv import ACTIVE_S, SAVING, kv
from triton_distributed.llm.routing.policies.named import looks_at_load, policy_named
from triton_distributed.llm.routing.speed import PrefillSpeed
from triton_distributed.llm.routing.view import Candidate, Decision, Mode, PolicyFailed, Question, RoutingPolicy, Worker
from triton_distributed.names import Instance
from triton_distributed.routing.load import LoadBook

AHEAD_S = 0.5
"""Seconds of prefill that a worker has booked at most when a further request is sent to it."""

PASSED = 50.0
"""A held request is passed by those that come within this many times the time of its prefill, if theirs is short."""

LOOK = 6
"""The first held requests that may wait for busy workers while a later one leaves. Others wait for them."""

MOST_LOOK = 64
"""The same, while a worker has nothing to do."""

MOST_WEIGHED = 32
"""Requests that are weighed anew at most for one to leave, beside those that have just come."""

MOST_NEW = 64
"""Requests that have just come and are weighed at most in one call, so that it takes some 2 ms."""

SETTLED_S = 0.25
"""After this time, held requests are weighed anew although nothing is known to have changed."""

SETTLED_FAR_S = 2.0
"""The same for those that are only looked at while a worker has nothing to do."""


class KnownWorker:
    """What the router knows of a worker.

    Attributes:
        worker: its instance and rank.
        instance: its record in discovery.
        work: what it has to do.
        speed: how long a prefill takes.
        mode: how its cache is known.
        silent: its engine should report its cache's blocks, and has not.
        kv_used: the part of its KV cache that requests hold.
        queued_s: seconds of prefill of the first held requests that wait for it.
    """

    __slots__ = ("instance", "kv_used", "mode", "queued_s", "silent", "speed", "work", "worker")

    def __init__(
        self, worker: Worker, instance: Instance, load: LoadBook | None, like: PrefillSpeed | None, counts: bool
    ) -> None:
        self.worker, self.instance = worker, instance
        self.work = Work(load, counts)
        self.speed = PrefillSpeed(like)
        self.mode: Mode = "off"
        self.silent = False
        self.kv_used = 0.0
        self.queued_s = 0.0


class _Held:
    """A held request, and what was decided for it last.

    Attributes:
        place: its place in the order, and a number of its own.
        worker: the one that was chosen; None without any.
        at: when that was.
        waits: the worker had no room then.
    """

    __slots__ = ("at", "place", "prefill_s", "question", "waits", "worker")

    def __init__(self, question: Question, number: int) -> None:
        self.question = question
        self.place = (-inf, number)
        self.worker: KnownWorker | None = None
        self.prefill_s, self.at, self.waits = 0.0, -inf, False


class Router:
    """Chooses workers.

    Args:
        policy: chooses among candidates.
        name: the policy's name, for explanations.
        max_entries: the most keys of the index.
        ahead_s: seconds of prefill that a worker has booked at most when a further request is sent to it; infinite
            for a policy that holds no request.
        load: counts the bookings of each instance, for policies of the runtime; None for others.
    """

    def __init__(
        self,
        policy: RoutingPolicy,
        name: str,
        *,
        max_entries: int = MAX_ENTRIES,
        ahead_s: float = AHEAD_S,
        load: LoadBook | None = None,
    ) -> None:
        self.load = load
        self.index: PrefixIndex[Worker] = PrefixIndex(max_entries)
        self.workers: dict[Worker, KnownWorker] = {}
        self._policy, self._name, self._ahead_s = policy, name, ahead_s
        self._counts = bool(getattr(policy, "counts_blocks", False))
        self._held: dict[Question, _Held] = {}
        self._new: dict[_Held, None] = {}  # Those of them that have no place in the order yet.
        self._order: list[tuple[tuple[float, int], _Held]] = []  # The others.
        self._came, self._held_s = 0, 0.0  # Requests that were held, and seconds of prefill of those that are held now.
        self._settled_at = -inf  # When no held request could leave, if nothing has changed since.

    @classmethod
    def named(
        cls, choice: str | RoutingPolicy, rng: random.Random | None = None, *, max_entries: int = MAX_ENTRIES
    ) -> Router:
        """A router with a policy by name, or with a user's own; see `policy_named`.

        Args:
            choice: the policy's name, or the policy.
            rng: the random source of the policy; None for a new one.
            max_entries: the most keys of the index.

        Raises:
            ConfigError: there is no such policy.
        """
        load = LoadBook()
        name, policy, holds = policy_named(choice, rng or random.Random(), load)
        ahead_s = AHEAD_S if holds else inf
        return cls(policy, name, max_entries=max_entries, ahead_s=ahead_s, load=load if looks_at_load(policy) else None)

    @property
    def policy(self) -> str:
        """The policy's name."""
        return self._name

    @property
    def held(self) -> int:
        """Requests that the router holds."""
        return len(self._held)

    @property
    def held_s(self) -> float:
        """Seconds of prefill of the requests that the router holds, for each worker."""
        return self._held_s / max(1, len(self.workers))

    def add(self, worker: Worker, instance: Instance) -> KnownWorker:
        """Add a worker, or return the known one."""
        found = self.workers.get(worker)
        if found is None:
            # Workers of one model are mostly alike: a new one is thought as fast as the one that was measured most.
            speeds = (each.speed for each in self.workers.values())
            like = max(speeds, key=lambda each: each.measured, default=None)
            found = self.workers[worker] = KnownWorker(worker, instance, self.load, like, self._counts)
            self.index.add(worker)
            self._unsettle()
        return found

    def remove(self, worker: Worker) -> None:
        """Forget a worker. Bookings there end on their own. Nothing happens if it is unknown."""
        known = self.workers.pop(worker, None)
        if known is not None:
            self.index.remove(worker)
            self._unsettle()

    def weigh(
        self,
        question: Question,
        now: float,
        among: Collection[Worker] | None = None,
    ) -> Decision | None:
        """Let the policy choose now. Nothing is booked.

        Args:
            question: the request.
            now: seconds, on the router's clock.
            among: the workers that may be chosen, of which unknown ones are passed over; None for all.

        Returns:
            The decision; None if there is no such worker.

        Raises:
            PolicyFailed: a user's policy cannot decide.
        """
        keys, size, tokens, excluded = question.keys, question.block_tokens, question.tokens, question.excluded
        depths = self.index.depths(keys) if keys else {}
        if among is None:
            among = self.workers
        if self._policy is kv and not question.explain:
            found = self._quickest(question, now, among, depths)
            return None if found is None else Decision(chosen=found, candidates=(found,), policy=self._name)
        last, whole = tokens - 1, len(keys)
        candidates = []
        for worker in among:
            known = self.workers.get(worker)
            if known is None or (excluded and worker in excluded):
                continue
            work, speed = known.work, known.speed
            promised = depth = depths.get(worker, 0)
            if depth < whole and work.promised:
                promised = work.promised_depth(keys, depth)
            prefill_s = speed.seconds(tokens)
            saved_s = 0.0
            # The last token is computed in any case: the first output follows from it.
            counted = min(promised * size, last)
            if counted:
                whole_s, prefill_s = prefill_s, speed.seconds(tokens - counted)
                saved_s = max(0.0, whole_s - prefill_s)
            candidates.append(
                Candidate(
                    worker,
                    known.instance,
                    min(depth * size, last),
                    counted,
                    prefill_s,
                    saved_s,
                    work.expected_wait_s(now) + known.queued_s,
                    len(work.waiting),
                    work.running,
                    work.waiting_tokens,
                    work.active_tokens,
                    known.kv_used,
                    known.mode,
                )
            )
        if not candidates:
            return None
        if self._counts:
            for each in candidates:
                each.unique_tokens = size * self.workers[each.worker].work.blocks_with(keys)
        return Decision(chosen=self._policy(question, candidates), candidates=candidates, policy=self._name)

    def _quickest(
        self,
        question: Question,
        now: float,
        among: Collection[Worker],
        depths: Mapping[Worker, int],
    ) -> Candidate | None:
        """What `kv` chooses, without a candidate for each of the others. `depths` is that of the question's keys."""
        keys, size, tokens, excluded = question.keys, question.block_tokens, question.tokens, question.excluded
        last, whole, workers = tokens - 1, len(keys), self.workers
        least, running, chosen = inf, 0, None
        depth = promised = 0
        prefill_s = saved_s = wait_s = 0.0
        for worker in among:
            known = workers.get(worker)
            if known is None or (excluded and worker in excluded):
                continue
            work, speed = known.work, known.speed
            blocks = found = depths.get(worker, 0) if depths else 0
            if found < whole and work.promised:
                blocks = work.promised_depth(keys, found)
            all_s = rest_s = speed.seconds(tokens)
            if blocks:
                counted = min(blocks * size, last)
                rest_s = speed.seconds(tokens - counted)
            saves_s = all_s - rest_s if all_s > rest_s else 0.0
            waits_s = work.expected_wait_s(now) if work.waiting else 0.0
            waits_s += known.queued_s
            cost = waits_s + rest_s - (SAVING - 1.0) * saves_s + ACTIVE_S * work.active_tokens
            if cost < least or (cost == least and work.running < running) or chosen is None:
                least, running, chosen = cost, work.running, known
                depth, promised, prefill_s, saved_s, wait_s = found, blocks, rest_s, saves_s, waits_s
        if chosen is None:
            return None
        work = chosen.work
        return Candidate(
            chosen.worker,
            chosen.instance,
            min(depth * size, last),
            min(promised * size, last),
            prefill_s,
            saved_s,
            wait_s,
            len(work.waiting),
            work.running,
            work.waiting_tokens,
            work.active_tokens,
            chosen.kv_used,
            chosen.mode,
            least,
        )

    def place(self, question: Question, now: float, among: Collection[Worker]) -> tuple[Decision, Booking] | None:
        """Choose and book a worker for a request that need not be held; None for one that has to, or without a worker.

        Args:
            question: the request.
            now: seconds, on the router's clock.
            among: as in `weigh`.

        Raises:
            PolicyFailed: a user's policy cannot decide.
        """
        if self._held or (decision := self.weigh(question, now, among)) is None:
            return None
        chosen = decision.chosen
        work = self.workers[chosen.worker].work
        if work.wait_s >= self._ahead_s:
            return None
        return decision, Booking(
            work, chosen.worker, question.tokens, chosen.promised_tokens, chosen.prefill_s, question.keys, now
        )

    def book(self, question: Question, decision: Decision, now: float) -> Booking:
        """Book the chosen worker. The caller tells of the first output, and releases the booking at the end."""
        chosen = decision.chosen
        work = self.workers[chosen.worker].work
        return Booking(
            work, chosen.worker, question.tokens, chosen.promised_tokens, chosen.prefill_s, question.keys, now
        )

    def book_computed(self, worker: Worker, tokens: int, now: float) -> Booking:
        """Book a worker for the rest of a request whose prompt, of so many tokens, is computed or comes from another.

        Raises:
            KeyError: the worker was not added.
        """
        return Booking(self.workers[worker].work, worker, tokens, tokens, 0.0, (), now, True)

    def book_reported(
        self, worker: Worker, tokens: int, cached_tokens: int, now: float, keys: Sequence[int] = ()
    ) -> Booking:
        """Book a request that another router has sent.

        Args:
            worker: the worker that has it.
            tokens: of its prompt.
            cached_tokens: those that the worker need not compute.
            now: when it came, in seconds on the router's clock.
            keys: of the whole blocks of its prompt, which the worker will hold.

        Raises:
            KeyError: the worker was not added.
        """
        known = self.workers[worker]
        return Booking(
            known.work, worker, tokens, cached_tokens, known.speed.seconds(tokens - cached_tokens), keys, now
        )

    def first_output(self, booking: Booking, now: float, cached_tokens: int | None = None) -> None:
        """Note the first output of a booked request, and learn from it. Nothing happens at a second call.

        Args:
            booking: of the request.
            now: seconds, on the router's clock.
            cached_tokens: prompt tokens that the engine did not compute, as it reports them; None if it does not.
        """
        measured = booking.first_output(now, cached_tokens)
        known = self.workers.get(booking.worker)
        if measured is not None and known is not None:
            known.speed.note(*measured)

    def hold(self, question: Question) -> None:
        """Hold a request until `leaving` gives it, or `withdraw` is called."""
        self._came += 1
        held = self._held[question] = _Held(question, self._came)
        self._new[held] = None

    def withdraw(self, question: Question) -> None:
        """Do not hold a request any more. Nothing happens if it has left."""
        held = self._held.pop(question, None)
        if held is None:
            return
        self._held_s -= held.prefill_s
        if held in self._new:
            del self._new[held]
        else:
            del self._order[bisect_left(self._order, (held.place,))]
        if held.waits:  # Others may be passed on.
            self._settled_at = -inf
        if not self._held:
            self._held_s = 0.0
            for known in self.workers.values():
                known.queued_s = 0.0

    def leaving(self, now: float, among: Collection[Worker] | None = None) -> tuple[Question, Decision] | None:
        """The next held request whose worker has room. It leaves the router. None if no request can leave.

        Book it before the next call. Call this until it returns None after each `hold`, first output and release, and
        while requests are held at least each second: a worker that stalls tells nothing.

        Args:
            now: seconds, on the router's clock.
            among: the workers that may be chosen; None for all.

        Raises:
            PolicyFailed: a user's policy cannot decide about one of them, which is held no longer. Call this again.
        """
        if not self._held:
            return None
        room = idle = False
        changed = bool(self._new) or now - self._settled_at >= SETTLED_S
        for known in self.workers.values():
            work = known.work
            if work.freed:
                work.freed, changed = False, True
            if work.wait_s < self._ahead_s:
                room = True
                idle = idle or not work.waiting
        if not changed:
            return None
        decisions: dict[_Held, Decision] = {}
        for held in list(islice(self._new, MOST_NEW)):
            self._weigh_held(held, now, among, decisions)
        self._settled_at = -inf if self._new else now
        if not room:
            return None
        for known in self.workers.values():
            known.queued_s = 0.0
        order, at, waiting, most = self._order, 0, 0, MOST_WEIGHED
        while at < len(order) and (waiting < LOOK or (idle and waiting < MOST_LOOK)):
            place, held = order[at]
            chosen = held.worker
            free = chosen is not None and chosen.work.wait_s < self._ahead_s
            known_s = SETTLED_S if waiting < LOOK else SETTLED_FAR_S
            if held not in decisions and (free or not held.waits or now - held.at >= known_s):
                if not most:
                    self._settled_at = -inf
                    break
                most -= 1
                self._weigh_held(held, now, among, decisions)
                chosen = held.worker
                if held.place > place and (chosen is None or chosen.work.waiting):
                    continue  # Its prefill takes longer than it did: perhaps others go before it now.
                free = chosen is not None and chosen.work.wait_s < self._ahead_s
            if free:
                question, decision = held.question, decisions[held]
                self.withdraw(question)
                decision.held_s = now - question.since
                self._settled_at = -inf
                return question, decision
            at += 1
            if chosen is not None:
                chosen.queued_s += held.prefill_s
                waiting += 1
        return None

    def _weigh_held(
        self, held: _Held, now: float, among: Collection[Worker] | None, decisions: dict[_Held, Decision]
    ) -> None:
        """Weigh a held request, and put it into its place in the order."""
        question = held.question
        try:
            decision = self.weigh(question, now, among)
        except PolicyFailed:
            self.withdraw(question)
            self._settled_at = -inf
            raise
        held.at, held.waits, before = now, True, held.place
        self._held_s -= held.prefill_s
        if decision is None:
            held.worker, held.prefill_s = None, 0.0
        else:
            decisions[held] = decision
            held.worker, held.prefill_s = self.workers[decision.chosen.worker], decision.chosen.prefill_s
            held.waits = held.worker.work.wait_s >= self._ahead_s
        self._held_s += held.prefill_s
        held.place = (question.since + PASSED * held.prefill_s, before[1])
        if held in self._new:
            del self._new[held]
        elif held.place == before:
            return
        else:
            del self._order[bisect_left(self._order, (before,))]
        insort(self._order, (held.place, held))

    def _unsettle(self) -> None:
        """Weigh all held requests anew, because the workers are others."""
        self._settled_at = -inf
        for held in self._held.values():
            held.worker, held.at = None, -inf
