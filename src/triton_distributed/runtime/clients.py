"""The clients of one runtime, and the counters of all clients that it ever had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple
from weakref import WeakSet, ref

from triton_distributed.names import EndpointName
from triton_distributed.observe import CallStats
from triton_distributed.observe.totals import Totals
from triton_distributed.runtime.client import Client


class Counted(NamedTuple):
    """The counters of calls to an endpoint; several may have the same endpoint."""

    name: EndpointName
    stats: CallStats


class Clients:
    """The clients that the program holds. Iterating yields them.

    Attributes:
        totals: the counters of all clients by endpoint, also of those that the program has dropped.
    """

    def __init__(self) -> None:
        self._alive: WeakSet[Client] = WeakSet()
        self.totals: Totals[EndpointName, CallStats] = Totals(CallStats)

    def add(self, client: Client) -> None:
        """Note a new client."""
        self._alive.add(client)
        self.totals.add(client.name, client.stats, _is_gone(ref(client)))

    def counted(self) -> Iterator[Counted]:
        """The counters of all clients, also of those that the program has dropped, each with its endpoint."""
        return (Counted(name, stats) for name in self.totals.keys for stats in self.totals.parts(name))

    def __len__(self) -> int:
        return len(self._alive)

    def __iter__(self) -> Iterator[Client]:
        return iter(self._alive)


def _is_gone(client: ref[Client]) -> Callable[[], bool]:
    return lambda: client() is None
