"""The ejection of outliers: instances that fail far more often than their peers.

A process judges by its own calls to one endpoint, and only by comparison: failures that all instances share, such as
bad requests or a broken dependency, eject no instance. Slow instances are not ejected; the policies `p2c` and
`least_loaded` avoid them. No clock and no I/O: time is an argument.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from types import MappingProxyType

import msgspec

from triton_distributed.names import Instance

LEAST_FAILURES = 5  # an ejection needs this many failures; Envoy and Finagle eject after five in a row
# Five failures in a row count if the peers gave this many answers meanwhile, and as many again for each failure of
# theirs. If all instances fail at one rate p, five failures and 20 answers have a probability of p^5 (1 - p)^20: at
# most 4 in a million.
PEER_ANSWERS = 20
RATE_GAP = 0.2  # smallest gap between the failure rates of an instance and its peers (Finagle: success rate below 80 %)
SURPRISE = 11.5  # ln(100,000): chance alone exceeds it at most once in 100,000 comparisons, see `far_beyond`
GROWTH = 60.0  # the longest ejection as a multiple of the first: 5 minutes for 5 s, as in Envoy and Finagle
_HIGHEST = 6  # the first level at which 2^level is above `GROWTH`


class Ejection(msgspec.Struct, frozen=True):
    """The ejection of one instance.

    Attributes:
        instance_id: the instance's id.
        since: time of the ejection on the caller's clock.
        until: time of its return on the same clock.
        times: number of recent ejections, this one included; good behaviour reduces it again.
        reason: the failures that led to it, as text with numbers.
    """

    instance_id: int
    since: float
    until: float
    times: int
    reason: str


class _Record:
    """Counts the outcomes of one instance since the record began, and since its last answer.

    Attributes:
        failed, answered: failures and answers of the instance.
        began: failures and answers of all instances before the record began.
        row: failures since the instance's last answer.
        row_began: failures and answers of all instances before the first failure of the row.
        cause: cause of the last failure.
    """

    __slots__ = ("answered", "began", "cause", "failed", "row", "row_began")

    def __init__(self, began: tuple[int, int]) -> None:
        self.failed = self.answered = self.row = 0
        self.began = self.row_began = began
        self.cause: int | None = None


class Outliers:
    """The ejected instances, and the recent outcomes of the others.

    The tables are bounded by discovery's: `forget` drops the instances that discovery no longer lists.

    Args:
        rng: spreads the ends of ejections, so that many clients do not return at once: an ejection lasts between half
            of its step and all of it.
        first_s: the first step in seconds. Each ejection doubles the step, up to `GROWTH` times the first. If an
            instance behaves well after its return for as long as it was out, one doubling is taken back.
    """

    __slots__ = ("_all_answered", "_all_failed", "_ejected", "_first_s", "_records", "_rng", "_standing", "ejected")

    def __init__(self, rng: random.Random, first_s: float) -> None:
        self._rng = rng
        self._first_s = first_s
        self._records: dict[int, _Record] = {}
        self._all_failed = self._all_answered = 0
        self._ejected: dict[int, Ejection] = {}
        self._standing: dict[int, tuple[int, float]] = {}  # of returned instances: level, and its start
        self.ejected: Mapping[int, Ejection] = MappingProxyType(self._ejected)
        """The ejected instances by id; a live view."""

    # outcomes

    def failed(
        self,
        instance_id: int,
        now: float,
        instances: tuple[Instance, ...],
        cause: int | None = None,
        began: float | None = None,
    ) -> Ejection | None:
        """Note that a call failed, perhaps because of its instance; eject the instance if it is an outlier.

        Args:
            instance_id: the instance of the call.
            now: seconds on any monotonic clock.
            instances: the instances in rotation. At most half of them are ever ejected, so never the last.
            cause: equal for failures that are one event, e.g. of all streams of a lost connection; None for a separate
                event.
            began: start of the call on the same clock, if known: calls from before an ejection do not count after it.
        """
        if instance_id in self._ejected or (
            began is not None and began < self._standing.get(instance_id, (0, began))[1]
        ):
            return None
        record = self._record(instance_id)
        if cause is not None and cause == record.cause:
            return None
        record.cause = cause
        if not record.row:
            record.row_began = self._all_failed, self._all_answered
        record.row += 1
        record.failed += 1
        self._all_failed += 1
        reason = self._outlier(record.row, 0, record.row_began) or self._outlier(
            record.failed, record.answered, record.began
        )
        return self._eject(instance_id, reason, now, instances) if reason else None

    def answered(self, instance_id: int) -> None:
        """Note that a call succeeded; needed only after a failure, until `restart`."""
        if instance_id not in self._ejected:
            record = self._record(instance_id)
            record.row = 0
            record.answered += 1
            self._all_answered += 1

    def restart(self) -> None:
        """Forget all outcomes; ejections stay."""
        self._records.clear()
        self._all_failed = self._all_answered = 0

    # ejections

    def readmit(self, now: float) -> list[int]:
        """End the ejections that are over and return their instances' ids; the records of these begin anew."""
        back = [each.instance_id for each in self._ejected.values() if each.until <= now]
        for instance_id in back:
            self._standing[instance_id] = (self._ejected.pop(instance_id).times, now)
        return back

    def next_return(self) -> float | None:
        """Return when the next ejection ends, on the clock of `failed`; None if no instance is ejected."""
        return min((each.until for each in self._ejected.values()), default=None)

    def available(self, instances: tuple[Instance, ...]) -> tuple[Instance, ...]:
        """Return the instances that are not ejected. If they are less than half of all, ejected ones fill up the half,
        those with the earliest return first."""
        if not self._ejected:
            return instances
        out = sorted((self._ejected[each.id] for each in instances if each.id in self._ejected), key=lambda e: -e.until)
        left_out = {each.instance_id for each in out[: len(instances) // 2]}
        return tuple(each for each in instances if each.id not in left_out) if left_out else instances

    def forget(self, known_ids: Collection[int]) -> None:
        """Drop the instances that discovery no longer lists.

        Args:
            known_ids: the ids that discovery lists; a set if there are many.
        """
        tables: tuple[dict[int, object], ...] = (self._records, self._ejected, self._standing)  # type: ignore[assignment]
        for table in tables:
            for instance_id in [each for each in table if each not in known_ids]:
                del table[instance_id]

    # bookkeeping

    def _record(self, instance_id: int) -> _Record:
        found = self._records.get(instance_id)
        if found is None:
            found = self._records[instance_id] = _Record((self._all_failed, self._all_answered))
        return found

    def _outlier(self, failed: int, answered: int, began: tuple[int, int]) -> str:
        """Return why these outcomes make an instance an outlier among its peers in the same time; empty if not."""
        peers_failed = self._all_failed - began[0] - failed
        peers_answered = self._all_answered - began[1] - answered
        if not far_beyond(failed, answered, peers_failed, peers_answered):
            return ""
        own = f"{failed} of its last {failed + answered} calls failed"
        return f"{own}, of its peers' {peers_failed} of {peers_failed + peers_answered}"

    def _eject(self, instance_id: int, reason: str, now: float, instances: tuple[Instance, ...]) -> Ejection | None:
        if (len(self._ejected) + 1) * 2 > len(instances):
            return None
        level = self._level(instance_id, now)
        wait = self._step(level) * (0.5 + 0.5 * self._rng.random())
        ejection = self._ejected[instance_id] = Ejection(instance_id, now, now + wait, level + 1, reason)
        self._standing.pop(instance_id, None)
        self.restart()  # from now on the others are compared without this instance
        return ejection

    def _step(self, level: int) -> float:
        return self._first_s * min(2.0**level, GROWTH)

    def _level(self, instance_id: int, now: float) -> int:
        """Return the number of the instance's recent ejections, less those that good behaviour has taken back."""
        level, since = self._standing.get(instance_id, (0, now))
        while level and now - since >= self._step(level - 1):
            level -= 1
            since += self._step(level)
        return min(level, _HIGHEST)


def far_beyond(failed: int, answered: int, peers_failed: int, peers_answered: int) -> bool:
    """Return whether an instance fails far more often than its peers do in the same time.

    It does if it gave no answer and failed `LEAST_FAILURES` times, while its peers gave `PEER_ANSWERS` answers, and
    as many again for each failure of theirs. It also does if the gap between both failure rates is at least
    `RATE_GAP` and larger than chance explains: between n and m calls that fail at one rate, a gap of g or more has a
    probability of at most exp(-2 g² / (1/n + 1/m)) (W. Hoeffding, "Probability Inequalities for Sums of Bounded Random
    Variables", 1963).
    """
    calls, peers_calls = failed + answered, peers_failed + peers_answered
    if failed < LEAST_FAILURES or not peers_calls:
        return False
    if not answered and peers_answered >= PEER_ANSWERS * (1 + peers_failed):
        return True
    gap = failed / calls - peers_failed / peers_calls
    return gap >= RATE_GAP and 2 * gap * gap >= SURPRISE * (1 / calls + 1 / peers_calls)
