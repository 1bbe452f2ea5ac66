"""The requests that wait for a batch: their order, when a batch is due, and which requests are in it. Pure.

The rules are those of the dynamic batcher of NVIDIA's Triton Inference Server ("Batchers" in its user guide).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Generic, Literal, Protocol, TypeVar

MOST = 100_000
"""The largest batch and queue that the options allow. A larger number is a slip, or needs another kind of program."""


class Waiting(Protocol):
    """A request that may wait in a `BatchQueue`.

    Attributes:
        arrived: when it came, in seconds on any clock.
        priority: larger ones go first.
        expires: when its time in the queue is over, on the same clock. `BatchQueue.add` sets it.
    """

    arrived: float
    priority: int
    expires: float


W = TypeVar("W", bound=Waiting)


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """How the requests of one priority may wait for a batch.

    Args:
        max_waiting: the most requests that wait. Further ones fail with `Overloaded`. None for no limit.
        timeout_s: the most seconds that a request waits for a place. None for no limit.
        on_timeout: what happens if there is no place then. `reject`: the request fails with `Overloaded`. `delay`: it
            waits until no other request of its priority or of a higher one waits.
        allow_override: a request may shorten `timeout_s` by the number of seconds in its metadata, under
            `queue_timeout_s`.

    Raises:
        TypeError, ValueError: an argument is outside its range.
    """

    max_waiting: int | None = None
    timeout_s: float | None = None
    on_timeout: Literal["reject", "delay"] = "reject"
    allow_override: bool = False

    def __post_init__(self) -> None:
        if self.max_waiting is not None:
            check_count("max_waiting", self.max_waiting)
        if self.timeout_s is not None:
            check_seconds("timeout_s", self.timeout_s, zero=False)
        if self.on_timeout not in ("reject", "delay"):
            raise ValueError(f"on_timeout={self.on_timeout!r}: must be 'reject' or 'delay'")
        if not isinstance(self.allow_override, bool):
            raise TypeError(f"allow_override={self.allow_override!r}: must be True or False")


def check_count(name: str, value: object) -> None:
    """Raise ValueError unless an option is a whole number from 1 to `MOST`."""
    if type(value) is not int or not 1 <= value <= MOST:
        raise ValueError(f"{name}={value!r}: must be a whole number from 1 to {MOST:,}")


def check_seconds(name: str, value: object, *, zero: bool) -> None:
    """Raise ValueError unless an option is a finite number of seconds."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < inf
    if not good or (not zero and value == 0):
        raise ValueError(f"{name}={value!r}: must be a number of seconds {'of at least' if zero else 'above'} 0")


class _Line(Generic[W]):
    """The waiting requests of one priority.

    Attributes:
        fresh: requests in the order in which they came.
        late: requests whose `timeout_s` is over and that were delayed. They go after `fresh`.
        expiry: no request of `fresh` expires before this time. It may be too early, because requests leave.
    """

    __slots__ = ("expiry", "fresh", "late", "policy")

    def __init__(self, policy: QueuePolicy) -> None:
        self.policy = policy
        self.fresh: OrderedDict[W, None] = OrderedDict()
        self.late: OrderedDict[W, None] = OrderedDict()
        self.expiry = inf


class BatchQueue(Generic[W]):
    """The requests that wait for a batch: by priority, then by arrival. Each operation is fast for any length.

    Args:
        max_size: the most requests of a batch.
        max_wait_s: seconds that a request waits for others while a batch could run.
        preferred_sizes: sizes at which a batch need not wait for more requests.
        policy: the policy of each priority that `policies` does not name.
        policies: policies of single priorities.
    """

    def __init__(
        self,
        max_size: int,
        max_wait_s: float,
        preferred_sizes: Sequence[int] = (),
        policy: QueuePolicy = QueuePolicy(),
        policies: Mapping[int, QueuePolicy] | None = None,
    ) -> None:
        self.max_size, self.max_wait_s = max_size, max_wait_s
        self._sizes = sorted({*preferred_sizes, max_size})
        self._policy, self._policies = policy, dict(policies or {})
        self._lines: dict[int, _Line[W]] = {}  # By priority. Empty ones are removed.
        self._waiting = 0
        self.expiry = inf  # No request expires before this time; see `_Line.expiry`.

    def __len__(self) -> int:
        return self._waiting

    def policy(self, priority: int) -> QueuePolicy:
        """The policy of the requests of this priority."""
        return self._policies.get(priority, self._policy)

    def add(self, request: W, timeout_s: float | None = None) -> bool:
        """Add a request. False if the queue of its priority is full.

        Args:
            timeout_s: the request's own limit for its time in the queue. It counts if the policy allows that and if it
                is shorter than the policy's.
        """
        line = self._lines.get(request.priority)
        if line is None:
            line = self._lines[request.priority] = _Line(self.policy(request.priority))
        policy = line.policy
        if policy.max_waiting is not None and len(line.fresh) + len(line.late) >= policy.max_waiting:
            return False
        limit_s = inf if policy.timeout_s is None else policy.timeout_s
        if timeout_s is not None and policy.allow_override and timeout_s < limit_s:
            limit_s = timeout_s
        request.expires = request.arrived + limit_s
        line.fresh[request] = None
        self._waiting += 1
        if request.expires < line.expiry:
            line.expiry = request.expires
            self.expiry = min(self.expiry, line.expiry)
        return True

    def remove(self, request: W) -> bool:
        """Remove a waiting request, because it has left. False if it does not wait here."""
        line = self._lines.get(request.priority)
        if line is None:
            return False
        for requests in (line.fresh, line.late):
            if request in requests:
                del requests[request]
                self._removed(request.priority, line)
                return True
        return False

    def expire(self, now: float) -> list[W]:
        """Delay or remove the requests whose time in the queue is over; return those that were removed."""
        if now < self.expiry:
            return []
        rejected = []
        for priority, line in list(self._lines.items()):
            if line.expiry > now:
                continue
            for request in [each for each in line.fresh if each.expires <= now]:
                del line.fresh[request]
                if line.policy.on_timeout == "delay":
                    line.late[request] = None
                else:
                    rejected.append(request)
                    self._removed(priority, line)
            line.expiry = min((each.expires for each in line.fresh), default=inf)
        self.expiry = min((each.expiry for each in self._lines.values()), default=inf)
        return rejected

    def due(self) -> float:
        """When the next batch should run, on the requests' clock. It may be too early, because requests leave.

        It is infinite without requests, and minus infinite when a batch need not wait for more of them.
        """
        if self._waiting >= self._sizes[0]:
            return -inf
        return min(self._oldest() + self.max_wait_s, self.expiry) if self._waiting else inf

    def take(self, now: float, present: Callable[[W], bool] = lambda request: True) -> list[W]:
        """Remove and return the requests of the next batch; an empty list if no batch is due.

        The batch has all requests, up to `max_size`, if one of them has waited for `max_wait_s`, or its time in the
        queue is over. Otherwise it has the largest of the preferred sizes that is possible.

        Args:
            present: whether a request has not left meanwhile. Others are removed, and are in no batch.
        """
        if self._oldest() + self.max_wait_s <= now or self._any_expired(now):
            size = self.max_size
        else:
            size = max((each for each in self._sizes if each <= self._waiting), default=0)
        batch: list[W] = []
        if size:
            for request in self._ordered():
                if present(request):
                    batch.append(request)
                self.remove(request)
                if len(batch) == size:
                    break
        return batch

    def _ordered(self) -> Iterator[W]:
        """The requests in the order in which they go. The caller removes each one before it asks for the next."""
        for priority in sorted(self._lines, reverse=True):
            line = self._lines[priority]
            for requests in (line.fresh, line.late):
                while requests:
                    yield next(iter(requests))

    def _oldest(self) -> float:
        """When the oldest request came; infinite without requests. A late request has waited long enough."""
        oldest = inf
        for line in self._lines.values():
            if line.late:
                return -inf
            if line.fresh:
                oldest = min(oldest, next(iter(line.fresh)).arrived)
        return oldest

    def _any_expired(self, now: float) -> bool:
        return self.expiry <= now and any(
            each.expires <= now for line in self._lines.values() if line.expiry <= now for each in line.fresh
        )

    def _removed(self, priority: int, line: _Line[W]) -> None:
        self._waiting -= 1
        if not line.fresh and not line.late:
            del self._lines[priority]
