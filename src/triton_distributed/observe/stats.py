"""Counters of endpoints and clients: plain integers that one event loop writes and any thread may read."""

from __future__ import annotations

from enum import IntEnum


class Outcome(IntEnum):
    """How a request ended."""

    OK = 0
    ERROR = 1  # the handler raised
    INVALID = 2  # the request did not fit the handler
    CANCELLED = 3  # the caller left
    DEADLINE = 4  # its deadline passed
    REFUSED = 5  # overloaded, draining or unknown here: no handler began
    LOST = 6  # the connection broke
    UNREACHABLE = 7  # calls only: no instance was found or reached


class OutlierStats:
    """Counts the ejections of an endpoint's outliers by the clients of one runtime.

    Attributes:
        ejections: number of ejections so far.
        out: number of instances that are ejected now.
    """

    __slots__ = ("ejections", "out")

    def __init__(self) -> None:
        self.ejections = self.out = 0

    def __repr__(self) -> str:
        return f"<OutlierStats ejections={self.ejections} out={self.out}>"


class Stats:
    """Counts the requests of one endpoint or the calls of one client.

    Attributes:
        inflight: requests under way.
        items: items sent by handlers that ended well.
        ended: number of ended requests, indexed by `Outcome`.
    """

    __slots__ = ("ended", "inflight", "items")

    def __init__(self) -> None:
        self.inflight = self.items = 0
        self.ended = [0] * len(Outcome)

    def outcomes(self) -> dict[str, int]:
        """Return the number of ended requests by the outcome's name in lower case."""
        return {each.name.lower(): self.ended[each] for each in Outcome}

    def __repr__(self) -> str:
        counts = ", ".join(f"{name}={count}" for name, count in self.outcomes().items() if count)
        return f"<Stats inflight={self.inflight} {counts or 'nothing ended'}>"
