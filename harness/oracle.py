"""Judges every request of a run: answered exactly, or failed with an error that is allowed in its case."""

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

# If a request ends with one of these errors, no handler has begun it, whatever the kind of call.
NOT_BEGUN = (Overloaded, Draining, Paused, ConnectionFailed, NoInstances)
# Seconds by which a deadline may come early: the loop's clock may be that coarse (uvloop's resolution is 1 ms).
CLOCK_S = 0.002


@dataclass(slots=True)
class Ticket:
    """The fate of one request.

    Attributes:
        plan: the call.
        items: the number of items so far; each was checked.
        outcome: `answered`, `left`, `cancelled`, `abandoned`, or the name of the error; empty while it is under way.
        began_s: when the call was made, and `ended_s`, when it was over, on the run's clock.
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
    """Follows the requests of a run and records violations of promises.

    Attributes:
        tickets: the tickets of all requests, in the order in which the requests were made.
        violations: descriptions of broken promises; empty after a good run.
        counts: the number of violations of each kind: `wrong` items, `truncated` streams, `failed` calls, requests that
            a handler `began` against the promise, and requests that were `late` or never ended.
        broken: the number of broken streams, by instance.
        answers_s: when each item came, if `times` is set; a long run has not enough memory for that.
        keeps: keep the tickets of calls that have ended; needed for `close`, `outcomes` and the methods after those.
        strict: a call that may move must not fail at all: there was always a worker to move to.
        spared: whether some worker was well from one moment to another, on the run's clock. A call is judged strictly
            only if one was. By default one always was.
        limited: the endpoint has `max_inflight`: a worker that is well may refuse, and no call is judged strictly.
        longest_s: seconds that faults may delay a call, in addition to its handler's pauses. No call may take longer,
            and a call with a longer timeout must not time out.
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
        """Note that a call is made now.

        Args:
            plan: the call.
            now: seconds on the run's clock.
        """
        ticket = Ticket(plan, now)
        if self.keeps:
            self.tickets.append(ticket)
        return ticket

    def item(self, ticket: Ticket, item: Any, now: float = 0.0) -> None:
        """Check the next item that the caller got, at time `now` on the run's clock."""
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
        """Note that the stream ended well."""
        self._end(ticket, "answered", now)
        work = ticket.plan.work
        if ticket.items < work.items:
            self._accuse(ticket, f"ended cleanly after {ticket.items} of {work.items} items", "truncated")
        if work.shape == Shape.ERROR:
            self._accuse(ticket, "ended cleanly though its handler raises", "truncated")
        if ticket.plan.timeout_s is not None and (work.items - 1) * work.pause_s > ticket.plan.timeout_s:
            self._accuse(ticket, "ended cleanly though its time was over before", "late")

    def left(self, ticket: Ticket, now: float) -> None:
        """Note that the caller stopped reading, as planned."""
        self._end(ticket, "left", now)

    def cancelled(self, ticket: Ticket, now: float) -> None:
        """Note that the reading task was cancelled, as planned."""
        self._end(ticket, "cancelled", now)

    def abandoned(self, ticket: Ticket, now: float) -> None:
        """Note that the caller's runtime was shut down while the call was under way."""
        self._end(ticket, "abandoned", now)

    def failed(self, ticket: Ticket, error: BaseException, now: float) -> None:
        """Note that the call ended with an error."""
        self._end(ticket, type(error).__name__, now)
        reason = self._unpromised(ticket, error)
        if reason:
            self._accuse(ticket, f"{reason}: {type(error).__name__}: {error}", "failed")

    def _unpromised(self, ticket: Ticket, error: BaseException) -> str:
        """Return why this error is not allowed; empty if it is allowed."""
        plan = ticket.plan
        work = plan.work
        if isinstance(error, StreamIncomplete):
            if isinstance(error, RemoteError):  # The relay's own call broke.
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
            return "its timeout was long enough" if plan.timeout_s > self.longest_s else ""
        if isinstance(error, InstanceNotFound) and plan.directly:
            return f"{ticket.items} items had come" if ticket.items else ""
        if isinstance(error, NOT_BEGUN):
            if ticket.items and not plan.resume:  # A resumed call may be refused by a later instance.
                return f"{ticket.items} items had come"
            return "there was an instance to take it" if self._strictly(ticket) else ""
        return "no promise covers this error"

    def _strictly(self, ticket: Ticket) -> bool:
        return self.strict and not self.limited and ticket.plan.moves and self.spared(ticket.began_s, ticket.ended_s)

    def close(self, begun: Counter[int]) -> None:
        """Make the checks that are possible only at the end.

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
        """The number of requests for each outcome."""
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
