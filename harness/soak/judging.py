"""Judges whether figures stay constant. Pure: figures in, descriptions out."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

WARM_UP = 0.2  # The share of the time in which pools, caches and the allocator fill.
HALF_WAY = 0.6  # The share in which tables may grow: each restart of a worker may show another one at its fullest.
PARTS = 5  # The first and the last of this many parts are compared.
# The memory that a process may gain after the warm-up: calls of the mix take up to 3 MiB each and come at random. A
# leak of 100 bytes for each call is nearly 3 MiB in one client in the rest of the ten minutes.
MOST_SHARE, MOST_BYTES = 0.03, 2 << 20
SHORTEST_S = 100.0  # Memory is judged only in longer runs. In shorter ones, growth proves nothing.
# The growth allowed between the first half and the last quiet moment: interned texts, compiled caches, one table of the
# interpreter that doubles. About 14,000 calls of each client and 25 restarts lie between them.
MOST = {"objects": 500, "blocks": 2_000, "allocated": 1 << 20}
# The growth allowed for instances of the package's classes, such as sessions or calls, and for entries of its tables.
# The caches of each endpoint hold up to three lost workers until their next use. These are values and not counted. Nor
# are the numbers in statistics, which have a bound; the statistics themselves are counted.
MOST_OWN, MOST_ENTRIES = 16, 40
STATISTICS = (
    "triton_distributed.observe.histogram.", "Histogram.",
    "CallStats.ended", "CallStats.whole", "RequestStats.ended", "RequestStats.whole",
)  # fmt: skip
VALUES = ("triton_distributed.names.", "Instance.", "EndpointName.", *STATISTICS)
COUNTED = ("descriptors", "tasks", "threads", "running")


@dataclass(frozen=True)
class Memory:
    """The course of resident memory after the warm-up, bytes.

    Attributes:
        first, last: the medians of the first and the last fifth.
        fitted: the gain of the line of least squares from its beginning to its end.
    """

    first: int
    last: int
    fitted: int

    @property
    def allowed(self) -> int:
        """The largest gain that is allowed."""
        return max(int(self.first * MOST_SHARE), MOST_BYTES)

    @property
    def flat(self) -> bool:
        """Whether neither the medians nor the line gain more than is allowed."""
        return max(self.last - self.first, self.fitted) <= self.allowed


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of y over x, by least squares; 0 if all points have the same x."""
    if len({x for x, _ in points}) < 2:
        return 0.0
    return statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope


def warm(samples: Iterable[Mapping[str, Any]], seconds: float) -> list[Mapping[str, Any]]:
    """The samples after the warm-up.

    Args:
        samples: samples with `at`, seconds from the beginning.
        seconds: the length of the whole run.
    """
    return [each for each in samples if each["at"] >= WARM_UP * seconds]


def memory(samples: Sequence[Mapping[str, Any]], seconds: float) -> Memory | None:
    """Return the course of memory; None if there are too few samples."""
    points = [(each["at"], each["rss"]) for each in warm(samples, seconds)]
    if len(points) < PARTS:
        return None
    part = len(points) // PARTS
    ends = (points[:part], points[-part:])
    first, last = (int(statistics.median(y for _, y in each)) for each in ends)
    return Memory(first, last, int(slope(points) * (points[-1][0] - points[0][0])))


def more(quiet: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe what is more at a quiet moment than at an earlier one.

    A decrease is fine: at the first moment, connections to a killed worker with a valid lease may still be tried.
    """
    found = []
    for what in COUNTED:
        values = [each[what] for each in quiet]
        if any(value > min(values[:k]) for k, value in enumerate(values) if k):
            found.append(f"{what} at quiet moments: {', '.join(map(str, values))}")
    if quiet and quiet[-1]["running"]:
        found.append(f"{quiet[-1]['running']} calls or handlers are open when nothing goes on")
    return found


def grown(growths: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Describe which objects of the package are more at the last quiet moment than at any one of the first half.

    Args:
        growths: `types`, objects by class, and `kept`, entries by `Class.attribute`.
    """
    own = {each: more for each, more in growths["types"].items() if each.startswith("triton_distributed.")}
    return [
        f"{what}: {more} more than at any quiet moment of the first half"
        for counts, most in ((own, MOST_OWN), (growths["kept"], MOST_ENTRIES))
        for what, more in counts.items()
        if more > most and not what.startswith(VALUES)
    ]


def process(history: Mapping[str, Any], seconds: float) -> tuple[dict[str, Any], list[str]]:
    """Return the figures of a process that ran all the time, and descriptions of what is wrong with them.

    Args:
        history: its `samples`, its `quiet` moments and its `growths`.
        seconds: the length of the whole run.
    """
    quiet = warm(history["quiet"], seconds)
    wrong = more(quiet)
    before = [each for each in quiet if each["at"] <= HALF_WAY * seconds]
    wrong += [
        f"{what} at quiet moments: {', '.join(str(each[what]) for each in quiet)}"
        for what, most in MOST.items()
        if before and seconds >= SHORTEST_S and quiet[-1][what] - max(each[what] for each in before) > most
    ]
    wrong += grown(history["growths"])
    found = memory(history["samples"], seconds)
    if found is not None and seconds >= SHORTEST_S and not found.flat:
        wrong.append(
            f"memory: {found.last - found.first:+,} bytes between the medians of the first and the last fifth, "
            f"{found.fitted:+,} along the line of least squares; at most {found.allowed:,} is flat"
        )
    return ({} if found is None else {**asdict(found), "allowed": found.allowed}), wrong


def lost(lost: Mapping[int, int], broken: Iterable[int]) -> list[str]:
    """Describe broken streams of instances that were neither killed nor cut off."""
    return [
        f"{count} streams of instance {instance} broke, which was neither killed nor cut off"
        for instance, count in lost.items()
        if instance not in set(broken)
    ]


def events(tallies: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Describe events that did not reach every process, from the news of each process at a quiet moment."""
    found = []
    for name, tally in tallies.items():
        found += [f"{name}: {each}" for each in tally["wrong"]]
        for publisher, told in tallies.items():
            if told["published"] and tally["heard"].get(publisher) != told["published"]:
                heard = tally["heard"].get(publisher)
                found.append(f"{name} heard event {heard} of {publisher} last, which published {told['published']}")
    return found
