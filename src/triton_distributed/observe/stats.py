"""Counters of an endpoint and of a client: plain integers that one event loop writes and any thread may read."""

from __future__ import annotations

from enum import IntEnum


class Outcome(IntEnum):
    """How a request ended."""

    OK = 0
    ERROR = 1  # the handler raised
    INVALID = 2  # the request did not fit the handler
    CANCELLED = 3  # the caller left
    DEADLINE = 4  # its time was over
    REFUSED = 5  # overloaded, draining or unknown here: no handler began
    LOST = 6  # the connection broke
    UNREACHABLE = 7  # of a call: no instance was found or reached


class OutlierStats:
    """What was seen of an endpoint's outliers by the clients of one runtime.

    Attributes:
        ejections: how often an instance was left out because it failed far more often than its peers.
        out: how many are left out now.
    """

    __slots__ = ("ejections", "out")

    def __init__(self) -> None:
        self.ejections = self.out = 0

    def __repr__(self) -> str:
        return f"<OutlierStats ejections={self.ejections} out={self.out}>"


class Stats:
    """Requests of one endpoint or calls of one client.

    Attributes:
        inflight: those under way.
        items: sent by an endpoint's handlers that ended well.
        ended: how many ended how; indexed by `Outcome`.
    """

    __slots__ = ("ended", "inflight", "items")

    def __init__(self) -> None:
        self.inflight = self.items = 0
        self.ended = [0] * len(Outcome)

    def outcomes(self) -> dict[str, int]:
        """How many ended how, by the outcome's name in lower case."""
        return {each.name.lower(): self.ended[each] for each in Outcome}

    def __repr__(self) -> str:
        counts = ", ".join(f"{name}={count}" for name, count in self.outcomes().items() if count)
        return f"<Stats inflight={self.inflight} {counts or 'nothing ended'}>"
