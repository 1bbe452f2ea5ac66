"""The load of each instance: the number of this process' streams open on it, and what its worker reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class ReportedLoad(NamedTuple):
    """The load of an instance, as its worker reported it: the requests of all clients.

    Attributes:
        in_flight: requests that were admitted and have not ended.
        queued: requests that wait in its queue.
        age_s: seconds since the report came. A worker repeats it at least every second.
    """

    in_flight: int
    queued: int
    age_s: float


def _no_worker(instance_id: int) -> None:
    """Ask no worker: a book of its own."""


class LoadBook:
    """Counts the streams that this process has open on each instance, from the request to the last item.

    An instance without streams has no entry, so the book is never larger than the number of open streams. It also holds
    the workers' own reports; those of instances that are gone are forgotten.

    Args:
        now: returns the time in seconds, on any monotonic clock.

    Attributes:
        want: called with the id of an instance whose report is wanted and is not here.
        used: a report was wanted since this was last set to False.
    """

    __slots__ = ("_now", "_open", "_reports", "used", "want")

    def __init__(self, now: Callable[[], float] = lambda: 0.0) -> None:
        self._open: dict[int, int] = {}
        self._now = now
        self._reports: dict[int, tuple[int, int, float]] = {}
        self.want: Callable[[int], None] = _no_worker
        self.used = False

    def acquire(self, instance_id: int) -> None:
        """Note one more stream on the instance; call `release` when it ends."""
        opened = self._open
        opened[instance_id] = opened.get(instance_id, 0) + 1

    def release(self, instance_id: int) -> None:
        """Note that a stream on the instance has ended.

        Raises:
            ValueError: the instance has no open stream.
        """
        opened = self._open
        left = opened.get(instance_id, 0) - 1
        if left > 0:
            opened[instance_id] = left
        elif left == 0:
            del opened[instance_id]
        else:
            raise ValueError(f"instance {instance_id} has no open stream to release")

    def inflight(self, instance_id: int) -> int:
        """Return the number of streams that this process has open on the instance."""
        return self._open.get(instance_id, 0)

    def reported(self, instance_id: int) -> ReportedLoad | None:
        """Return the load of the instance as its worker reports it; None if there is no report.

        The first use asks the worker, so reports come from then on, at most every 100 ms, and stop some seconds after
        the last use. It is missing while this process has no connection to the worker.
        """
        self.used = True
        found = self._reports.get(instance_id)
        if found is None:
            self.want(instance_id)
            return None
        in_flight, queued, at = found
        return ReportedLoad(in_flight, queued, max(0.0, self._now() - at))

    def note_report(self, instance_id: int, in_flight: int, queued: int) -> None:
        """Note what a worker has reported."""
        self._reports[instance_id] = (in_flight, queued, self._now())

    def forget_report(self, instance_id: int) -> None:
        """Forget what a worker has reported, because it is gone or no longer asked."""
        self._reports.pop(instance_id, None)

    def open(self) -> dict[int, int]:
        """Return the number of open streams by instance id, without zeros."""
        return dict(self._open)

    def __getitem__(self, instance_id: int) -> int:
        return self._open.get(instance_id, 0)

    def __len__(self) -> int:
        return len(self._open)

    def __repr__(self) -> str:
        return f"<LoadBook of {sum(self._open.values())} stream(s) on {len(self._open)} instance(s)>"
