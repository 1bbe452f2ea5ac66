"""Whether figures stay where they are. Pure: figures in, words out."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

WARM_UP = 0.2  # of the time: pools, caches and the allocator fill
HALF_WAY = 0.6  # until then tables may grow: each restart of a worker shows another of them at its fullest
PARTS = 5  # the first and the last of so many parts are compared
# What a process may gain from the end of the warm-up on: calls of the mix take up to 3 MiB each and come at random. A
# leak of 100 bytes a call is nearly 3 MiB of one client in the rest of the ten minutes.
MOST_SHARE, MOST_BYTES = 0.03, 2 << 20
SHORTEST_S = 100.0  # of runs whose memory is judged: what fills in a shorter one is no sign of anything
# What may be more at the last quiet moment than at any of the first half: interned texts, compiled caches, one table of
# the interpreter's that doubles. Some 14,000 calls of each client and 25 restarts lie between them.
MOST = {"objects": 500, "blocks": 2_000, "allocated": 1 << 20}
# Instances of the package's own classes, a session or a call, and entries of its tables. The caches of each endpoint
# hold up to three workers that are gone, until they are next used; these are values and not counted themselves.
MOST_OWN, MOST_ENTRIES = 16, 40
VALUES = ("triton_distributed.names.", "Instance.", "EndpointName.")
COUNTED = ("descriptors", "tasks", "threads", "running")


@dataclass(frozen=True)
class Memory:
    """How resident memory went after the warm-up, bytes.

    Attributes:
        first, last: the medians of the first and the last fifth.
        fitted: what the line of least squares gains from its beginning to its end.
    """

    first: int
    last: int
    fitted: int

    @property
    def allowed(self) -> int:
        """What both may gain at most."""
        return max(int(self.first * MOST_SHARE), MOST_BYTES)

    @property
    def flat(self) -> bool:
        """Whether neither the medians nor the line gain more."""
        return max(self.last - self.first, self.fitted) <= self.allowed


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Units of y a unit of x, by least squares; 0 for points of one x."""
    if len({x for x, _ in points}) < 2:
        return 0.0
    return statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope


def warm(samples: Iterable[Mapping[str, Any]], seconds: float) -> list[Mapping[str, Any]]:
    """The samples after the warm-up.

    Args:
        samples: with `at`, seconds from the beginning.
        seconds: of the whole run.
    """
    return [each for each in samples if each["at"] >= WARM_UP * seconds]


def memory(samples: Sequence[Mapping[str, Any]], seconds: float) -> Memory | None:
    """How memory went; None where there are too few samples to say."""
    points = [(each["at"], each["rss"]) for each in warm(samples, seconds)]
    if len(points) < PARTS:
        return None
    part = len(points) // PARTS
    ends = (points[:part], points[-part:])
    first, last = (int(statistics.median(y for _, y in each)) for each in ends)
    return Memory(first, last, int(slope(points) * (points[-1][0] - points[0][0])))


def more(quiet: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is more at a quiet moment than at one before, in words.

    Less is let be: the connection to a killed worker whose lease runs may still be tried at the first.
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
    """What of the package's own is more at the last quiet moment than at any of the first half, in words.

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
    """The figures of a process that was there all the time, and what is wrong with them.

    Args:
        history: its `samples`, its `quiet` moments and its `growths`.
        seconds: of the whole run.
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
    """Streams that broke on instances that were neither killed nor cut off."""
    return [
        f"{count} streams of instance {instance} broke, which was neither killed nor cut off"
        for instance, count in lost.items()
        if instance not in set(broken)
    ]


def events(tallies: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Events that did not reach every process, by the news of each process at a quiet moment."""
    found = []
    for name, tally in tallies.items():
        found += [f"{name}: {each}" for each in tally["wrong"]]
        for publisher, told in tallies.items():
            if told["published"] and tally["heard"].get(publisher) != told["published"]:
                heard = tally["heard"].get(publisher)
                found.append(f"{name} heard event {heard} of {publisher} last, which published {told['published']}")
    return found
