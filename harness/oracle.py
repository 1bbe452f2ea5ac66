"""Judges every request of a run: answered exactly, or failed with an error that was promised for its case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from harness.requests import RELAY, Plan, Shape
from triton_distributed.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    Draining,
    InstanceNotFound,
    NoInstances,
    Overloaded,
    Paused,
    RemoteError,
    StreamIncomplete,
)

# A request that these end was not begun by any handler, whatever kind of call it was.
NOT_BEGUN = (Overloaded, Draining, Paused, ConnectionFailed, NoInstances)
# Seconds by which a deadline may be told early: the loop's clock may be as coarse as that (uvloop's is 1 ms).
CLOCK_S = 0.002


@dataclass(slots=True)
class Ticket:
    """What became of one request.

    Attributes:
        plan: the call.
        items: how many arrived so far; each was looked at.
        outcome: `answered`, `left`, `cancelled`, `abandoned`, or the name of the error; empty while it is under way.
        began_s: when it was made, and `ended_s`, when it was over, on the run's clock.
        pause_s: the longest time between two items.
    """

    plan: Plan
    began_s: float
    items: int = 0
    outcome: str = ""
    ended_s: float = 0.0
    pause_s: float = 0.0
    last_s: float = 0.0


@dataclass(slots=True)
class Oracle:
    """Follows the requests of a run and writes down what must not be.

    Attributes:
        tickets: of all requests, in the order in which they were made.
        violations: what broke a promise, in words; empty after a good run.
        counts: how many of them are of each kind: `wrong` items, `truncated` streams, `failed` calls, those that a
            handler `began` against the promise, and those that were `late` or never ended.
        broken: streams that broke, by the instance.
        answers_s: when each item came, where `times` is set; a long run has no memory for that.
        keeps: hold on to the tickets of calls that have ended; needed for `close`, `outcomes` and what follows those.
        strict: a call that may move must not fail at all: there was always a worker to move to.
        spared: whether some worker was well from one moment to another, on the run's clock; a call is judged strictly
            only where one was. By default one always was.
        limited: the endpoint has `max_inflight`: a worker that is well may refuse, and nothing is judged strictly.
        longest_s: seconds that a call may be held up by faults, beside its handler's pauses; none may take longer, and
            one that has more time must not run out of it.
    """

    strict: bool = False
    spared: Callable[[float, float], bool] = lambda began_s, ended_s: True
    limited: bool = False
    longest_s: float = float("inf")
    tickets: list[Ticket] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    broken: Counter[int] = field(default_factory=Counter)
    answers_s: list[float] = field(default_factory=list)
    times: bool = False
    keeps: bool = True

    def begin(self, plan: Plan, now: float) -> Ticket:
        """Note that the call is made now.

        Args:
            plan: the call.
            now: seconds on the run's clock.
        """
        ticket = Ticket(plan, now)
        if self.keeps:
            self.tickets.append(ticket)
        return ticket

    def item(self, ticket: Ticket, item: Any, now: float = 0.0) -> None:
        """Look at the next item that the caller got, at this moment of the run's clock."""
        if self.times:
            self.answers_s.append(now)
        if ticket.last_s:
            ticket.pause_s = max(ticket.pause_s, now - ticket.last_s)
        ticket.last_s = now
        work = ticket.plan.work
        expected = work.item(ticket.items)
        if ticket.items >= work.items:
            self._accuse(ticket, f"got an item too many: {_short(item)}", "wrong")
        elif item != expected:
            self._accuse(ticket, f"item {ticket.items} is {_short(item)}, not {_short(expected)}", "wrong")
        ticket.items += 1

    def answered(self, ticket: Ticket, now: float) -> None:
        """The stream ended well."""
        self._end(ticket, "answered", now)
        work = ticket.plan.work
        if ticket.items < work.items:
            self._accuse(ticket, f"ended cleanly after {ticket.items} of {work.items} items", "truncated")
        if work.shape == Shape.ERROR:
            self._accuse(ticket, "ended cleanly though its handler raises", "truncated")
        if ticket.plan.timeout_s is not None and (work.items - 1) * work.pause_s > ticket.plan.timeout_s:
            self._accuse(ticket, "ended cleanly though its time was over before", "late")

    def left(self, ticket: Ticket, now: float) -> None:
        """The caller stopped reading, as planned."""
        self._end(ticket, "left", now)

    def cancelled(self, ticket: Ticket, now: float) -> None:
        """The reading task was cancelled, as planned."""
        self._end(ticket, "cancelled", now)

    def abandoned(self, ticket: Ticket, now: float) -> None:
        """Its own runtime was shut down while it was under way."""
        self._end(ticket, "abandoned", now)

    def failed(self, ticket: Ticket, error: BaseException, now: float) -> None:
        """The call ended with an error."""
        self._end(ticket, type(error).__name__, now)
        reason = self._unpromised(ticket, error)
        if reason:
            self._accuse(ticket, f"{reason}: {type(error).__name__}: {error}", "failed")

    def _unpromised(self, ticket: Ticket, error: BaseException) -> str:
        """Why this error should not have been; empty where it was promised."""
        plan = ticket.plan
        work = plan.work
        if isinstance(error, StreamIncomplete):
            if isinstance(error, RemoteError):  # the relay's own call broke
                return "" if plan.via == RELAY else "an error that its handler does not raise"
            self.broken[error.instance_id] += 1
            if error.items != ticket.items:
                return f"the error tells of {error.items} items and {ticket.items} came"
            moves = plan.resume or (plan.idempotent and not ticket.items)
            return "it could have moved to another instance" if moves and self._strictly(ticket) else ""
        if isinstance(error, RemoteError):
            ticket.outcome = "handler's error"
            if work.shape != Shape.ERROR or not isinstance(error, LookupError):
                return "an error that its handler does not raise"
            return "" if ticket.items == work.items else f"only {ticket.items} of {work.items} items came before"
        if isinstance(error, DeadlineExceeded):
            if plan.timeout_s is None or ticket.ended_s - ticket.began_s < plan.timeout_s - CLOCK_S:
                return "its time is not over"
            return "its time was more than enough" if plan.timeout_s > self.longest_s else ""
        if isinstance(error, InstanceNotFound) and plan.directly:
            return f"{ticket.items} items had come" if ticket.items else ""
        if isinstance(error, NOT_BEGUN):
            if ticket.items and not plan.resume:  # else another instance has begun it
                return f"{ticket.items} items had come"
            return "there was an instance to take it" if self._strictly(ticket) else ""
        return "no promise covers this error"

    def _strictly(self, ticket: Ticket) -> bool:
        return self.strict and not self.limited and ticket.plan.moves and self.spared(ticket.began_s, ticket.ended_s)

    def close(self, begun: Counter[int]) -> None:
        """Judge what can only be judged at the end.

        Args:
            begun: how often a handler began each request, by its id; from the workers' journals.
        """
        known = {ticket.plan.work.id: ticket for ticket in self.tickets}
        for ticket in self.tickets:
            if not ticket.outcome:
                self._accuse(ticket, "never ended", "late")
        for request_id, times in begun.items():
            found = known.get(request_id)
            if found is None:
                self.violations.append(f"a handler began request {request_id}, which no caller made")
                self.counts["began"] += 1
            elif found.plan.once and times > 1:
                self._accuse(found, f"{times} handlers began it, and it may be begun once", "began")
            elif found.outcome in {each.__name__ for each in NOT_BEGUN} and found.plan.once:
                self._accuse(found, f"it failed as not begun ({found.outcome}), and a handler began it", "began")
        for ticket in self.tickets:
            if ticket.items and ticket.plan.work.id not in begun:
                self._accuse(ticket, "it was answered, and no handler began it", "began")

    def outcomes(self) -> Counter[str]:
        """How many requests ended how."""
        return Counter(ticket.outcome or "never ended" for ticket in self.tickets)

    def worst_gap_s(self) -> float:
        """The longest time in which no request was answered, seconds; 0.0 with fewer than two answers."""
        ends = sorted(ticket.ended_s for ticket in self.tickets if ticket.outcome == "answered")
        return max((later - earlier for earlier, later in pairwise(ends)), default=0.0)

    def worst_call_s(self) -> float:
        """The longest time that an answered request took, seconds; 0.0 without one."""
        return max((each.ended_s - each.began_s for each in self.tickets if each.outcome == "answered"), default=0.0)

    def _end(self, ticket: Ticket, outcome: str, now: float) -> None:
        if ticket.outcome:
            self._accuse(ticket, f"ended twice: {ticket.outcome}, then {outcome}", "late")
        ticket.outcome, ticket.ended_s = outcome, now
        work = ticket.plan.work
        if now - ticket.began_s > self.longest_s + work.items * work.pause_s:
            self._accuse(ticket, f"took {now - ticket.began_s:.1f} s until it was {outcome}", "late")

    def _accuse(self, ticket: Ticket, what: str, kind: str) -> None:
        work = ticket.plan.work
        self.counts[kind] += 1
        self.violations.append(f"request {work.id} ({work.shape}, {work.items} items): {what}")


def _short(item: Any) -> str:
    return f"{item!r:.80}"
