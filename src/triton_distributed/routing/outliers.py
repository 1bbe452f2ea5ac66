"""Instances that fail or are slow far beyond their peers, and how long each is left out for that.

One process judges by its own calls to one endpoint, and only by comparison: what goes wrong everywhere, be it bad
requests, a broken dependency or an overload, ejects nobody. No clock and no I/O: time is an argument.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import log
from statistics import median_low
from types import MappingProxyType

from triton_distributed.names import Instance
from triton_distributed.routing.evidence import HALF_LIFE_S, Evidence, Times, deviations, likelihood_gain

LEAST_EVENTS = 5  # fewer failures say nothing (five in a row eject in Envoy and in Finagle)
CALM = 0.5  # events: the last was half a minute ago, or a hundred calls
LEAST_CALLS = 10  # of its peers': with nothing to compare to, nobody is ejected
RATE_GAP = 0.2  # beyond the peers' rate of failure (Finagle asks for 80 % of success)
GAIN = 12.0  # see `likelihood_gain`: where chance alone is at work, one look in 100,000 passes it
LEAST_TIMED = 20  # calls, of its own and of its peers'
LEAST_TIMED_LOOKS = 10  # with times: calls of one moment wait for the same pause, so moments count, not calls alone
SLOW_RATIO = 5.0  # times the median of all: twice or thrice as slow is a smaller machine, not a sick one
SLOW_GAP_S = 0.1  # differences that nobody feels eject nobody (R. B. Miller 1968: 0.1 s seems instantaneous)
SLOW_DEVIATIONS = 5.0  # see `deviations`
SLOW_LOOKS = 3  # in a row
GROWTH = 60.0  # the longest ejection is so many times the first: 5 minutes, as in Envoy and Finagle, for 5 s
_HIGHEST = 6  # the level at which 2^level is above `GROWTH`


@dataclass(frozen=True, slots=True)
class Ejection:
    """An instance that is left out.

    Attributes:
        instance_id: which.
        since: when it was ejected, on the clock of `look`.
        until: when it comes back.
        times: how often it was ejected lately, this one included; good behaviour takes it down again.
        reason: what it did, in numbers, for people.
    """

    instance_id: int
    since: float
    until: float
    times: int
    reason: str


class Outliers:
    """Who is left out, and what is known of the others.

    The tables are at most as large as discovery's: `forget` drops what that no longer lists.

    Args:
        rng: spreads the ends of ejections of many clients: each lasts between half of its step and all of it.
        first_s: seconds of the first step; it doubles with each ejection, up to `GROWTH` times as much. An instance
            that came back and was good for as long as it had been out is forgiven one doubling.

    Attributes:
        answered: calls that ended well since the last look, by instance id, from the first failure until `calm`.
    """

    __slots__ = ("_ejected", "_evidence", "_first_s", "_looked", "_rng", "_standing", "_typical", "answered", "ejected")

    def __init__(self, rng: random.Random, first_s: float) -> None:
        self._rng = rng
        self._first_s = first_s
        self._evidence: dict[int, Evidence] = {}
        self._ejected: dict[int, Ejection] = {}
        self._standing: dict[int, tuple[int, float]] = {}  # of those that came back: level, since when
        self._looked: float | None = None
        self._typical: float | None = None  # the mean logarithm of the instance in the middle, at the last look
        self.answered: defaultdict[int, int] = defaultdict(int)
        self.ejected: Mapping[int, Ejection] = MappingProxyType(self._ejected)
        """Those that are left out, by instance id; a live view."""

    # what happens

    def failed(self, instance_id: int, cause: int | None = None, began: float | None = None) -> bool:
        """A call to the instance failed, and that may be its fault.

        Args:
            cause: see `Evidence.note_failure`.
            began: when the call began, on the clock of `look`, where that is known: one from before an ejection is not
                counted after it.

        Returns:
            whether it should be looked at now.
        """
        if began is not None and instance_id in self._standing and began < self._standing[instance_id][1]:
            return False
        return instance_id not in self._ejected and self._of(instance_id).note_failure(cause)

    def timed(self, instance_id: int, seconds: float) -> None:
        """The first answer to a call took so long."""
        if instance_id not in self._ejected:
            self._of(instance_id).note_time(seconds)

    def left(self, instance_id: int, seconds: float) -> None:
        """Nobody waits for the first answer any more: it would have taken longer than that.

        It tells something where the others answer sooner.
        """
        if self._typical is not None and log(max(seconds, 1e-9)) > self._typical:
            self.timed(instance_id, seconds)

    # who is out

    def look(
        self, now: float, instances: tuple[Instance, ...], waiting: Iterable[tuple[int, float]] = ()
    ) -> Ejection | None:
        """Compare all, to be called about once a second while there are calls; ejects the worst outlier, if any.

        Args:
            now: seconds on any clock that only goes forward.
            instances: those in rotation. At most half of them are ever ejected, so never the last.
            waiting: (instance id, seconds so far) of calls that are timed and have no answer yet.
        """
        self._count_answered()
        known = {each.id for each in instances if each.id not in self._ejected}
        waiting = [each for each in waiting if each[0] in known]
        for instance_id, _ in waiting:
            self._of(instance_id)
        peers = self._peers(instances)
        found = self._failing(sorted(peers, key=lambda each: -_rate(peers[each])), peers)
        found = self._slowest(peers, waiting) if found is None else found
        ejection = self._eject(*found, now, instances) if found is not None else None
        keep = 0.5 ** ((now - self._looked) / HALF_LIFE_S) if self._looked is not None else 1.0
        self._looked = now
        for each in self._evidence.values():
            each.fade(keep)
            each.fresh, each.enough = 0, LEAST_EVENTS
        return ejection

    def look_at(self, instance_id: int, now: float, instances: tuple[Instance, ...]) -> Ejection | None:
        """Compare the failures of one instance at once, where `failed` said so; ejects it, if it is an outlier.

        Args:
            instance_id: which.
            now, instances: as in `look`.
        """
        self._count_answered()
        peers = self._peers(instances)
        found = self._failing([instance_id], peers) if instance_id in peers else None
        ejection = self._eject(*found, now, instances) if found is not None else None
        if ejection is None:
            suspect = self._of(instance_id)
            suspect.fade(1.0)
            if suspect.fresh >= suspect.enough:
                suspect.fresh, suspect.enough = 0, 2 * suspect.enough
        return ejection

    def calm(self) -> bool:
        """Whether no failure counts any more. What was answered is forgotten then, and need not be counted."""
        if any(each.events >= CALM for each in self._evidence.values()):
            return False
        self.answered.clear()
        for each in self._evidence.values():
            each.answered = each.failed = each.events = 0.0
        return True

    def readmit(self, now: float) -> list[int]:
        """Let those come back whose time is over, with clean statistics; returns their ids."""
        back = [each.instance_id for each in self._ejected.values() if each.until <= now]
        for instance_id in back:
            ejection = self._ejected.pop(instance_id)
            self._standing[instance_id] = (ejection.times, now)
            self._evidence.pop(instance_id, None)
            self.answered.pop(instance_id, None)
        return back

    def next_return(self) -> float | None:
        """When the next ejection ends, on the clock of `look`; None where nobody is out."""
        return min((each.until for each in self._ejected.values()), default=None)

    def available(self, instances: tuple[Instance, ...]) -> tuple[Instance, ...]:
        """Those that are not ejected. Of the ejected, those come along that must: no more than half are left out."""
        if not self._ejected:
            return instances
        out = [self._ejected[each.id] for each in instances if each.id in self._ejected]
        if not out:
            return instances
        out.sort(key=lambda each: each.until)
        most = len(instances) // 2
        left_out = {each.instance_id for each in out[len(out) - min(len(out), most) :]}
        return tuple(each for each in instances if each.id not in left_out) if left_out else instances

    def forget(self, known_ids: Collection[int]) -> None:
        """Drop whatever discovery no longer lists.

        Args:
            known_ids: the ids that it does list; a set where there are many.
        """
        tables: tuple[dict[int, object], ...] = (self.answered, self._evidence, self._ejected, self._standing)  # type: ignore[assignment]
        for table in tables:
            for instance_id in [each for each in table if each not in known_ids]:
                del table[instance_id]

    # how

    def _of(self, instance_id: int) -> Evidence:
        found = self._evidence.get(instance_id)
        if found is None:
            found = self._evidence[instance_id] = Evidence(LEAST_EVENTS)
        return found

    def _count_answered(self) -> None:
        for instance_id, count in self.answered.items():
            if instance_id not in self._ejected:
                self._of(instance_id).answered += count
        self.answered.clear()

    def _peers(self, instances: tuple[Instance, ...]) -> dict[int, Evidence]:
        """Of whom something is known, of those that are called."""
        evidence, ejected = self._evidence, self._ejected
        return {each.id: evidence[each.id] for each in instances if each.id in evidence and each.id not in ejected}

    def _failing(self, suspects: Iterable[int], peers: Mapping[int, Evidence]) -> tuple[int, str] | None:
        """The first of the suspects that fails far beyond its peers, and why."""
        all_failed = sum(each.failed for each in peers.values())
        all_answered = sum(each.answered for each in peers.values())
        for instance_id in suspects:
            own = peers[instance_id]
            if own.events < LEAST_EVENTS:
                continue
            failed, answered = max(0.0, all_failed - own.failed), max(0.0, all_answered - own.answered)
            calls = failed + answered
            if calls < LEAST_CALLS or own.failed / own.calls < failed / calls + RATE_GAP:
                continue
            if likelihood_gain(own.failed, own.answered, failed, answered) >= GAIN:
                told = f"{own.failed:.0f} of its last {own.calls:.0f} calls failed"
                return instance_id, f"{told}, of its peers' {failed:.0f} of {calls:.0f}"
        return None

    def _slowest(self, peers: Mapping[int, Evidence], waiting: Iterable[tuple[int, float]]) -> tuple[int, str] | None:
        """The slowest of those that are far slower than their peers and have been for some looks, and why."""
        times = {each: Times(one.timed, one.logs, one.squares) for each, one in peers.items() if one.timed}
        if not times:
            return None
        # Where there are two in the middle, the faster: of two instances the slower can be an outlier.
        typical = self._typical = median_low([each.mean for each in times.values()])
        late = set()
        for instance_id, seconds in waiting:
            value = log(max(seconds, 1e-9))
            if value > typical:
                late.add(instance_id)
                times.setdefault(instance_id, Times()).add(Times(1.0, value, value * value))
        everybody = Times()
        for each in times.values():
            everybody.add(each)
        found: tuple[float, int, str] | None = None
        for instance_id, own in times.items():
            reason, one = _slow(own, everybody, typical), peers[instance_id]
            one.looked_at(bool(reason), instance_id in late)
            sure = one.slow_looks >= SLOW_LOOKS and one.timed_looks >= LEAST_TIMED_LOOKS
            if sure and (found is None or own.mean > found[0]):
                found = (own.mean, instance_id, reason)
        return found[1:] if found is not None else None

    def _eject(self, instance_id: int, reason: str, now: float, instances: tuple[Instance, ...]) -> Ejection | None:
        out = sum(1 for each in instances if each.id in self._ejected)
        if (out + 1) * 2 > len(instances):
            return None
        level = self._level(instance_id, now)
        wait = self._step(level) * (0.5 + 0.5 * self._rng.random())
        ejection = Ejection(instance_id, now, now + wait, level + 1, reason)
        self._ejected[instance_id] = ejection
        self._standing.pop(instance_id, None)
        self._evidence.pop(instance_id, None)
        return ejection

    def _step(self, level: int) -> float:
        return self._first_s * min(2.0**level, GROWTH)

    def _level(self, instance_id: int, now: float) -> int:
        """How often it was ejected lately: each ejection is forgiven after as long a time of good behaviour."""
        level, since = self._standing.get(instance_id, (0, now))
        good = now - since
        while level and good >= self._step(level - 1):
            good -= self._step(level - 1)
            level -= 1
        return min(level, _HIGHEST)


def _rate(evidence: Evidence) -> float:
    return evidence.failed / evidence.calls if evidence.events >= LEAST_EVENTS else 0.0


def _slow(own: Times, everybody: Times, typical: float) -> str:
    """Why an instance is far slower than the others; "" where it is not."""
    if own.count < LEAST_TIMED or own.mean < typical + log(SLOW_RATIO):
        return ""
    peers = Times(everybody.count, everybody.logs, everybody.squares)
    peers.add(own, -1)
    if peers.count < LEAST_TIMED or own.seconds < peers.seconds + SLOW_GAP_S:
        return ""
    if deviations(own, peers) < SLOW_DEVIATIONS:
        return ""
    return f"its first answers take {own.seconds:.3g} s, those of its peers {peers.seconds:.3g} s"
