"""What every discovery backend does: register, withdraw, and watch as one snapshot followed by changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from triton_distributed.names import EndpointName, Instance


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All instances that exist now; replaces what was known."""

    instances: tuple[Instance, ...]


@dataclass(frozen=True, slots=True)
class Added:
    """An instance is new, or has changed: it replaces the one with the same endpoint and id."""

    instance: Instance


@dataclass(frozen=True, slots=True)
class Removed:
    """An instance is gone: withdrawn, or its process is dead."""

    endpoint: EndpointName
    instance_id: int


Change = Snapshot | Added | Removed

#: Receives each change, in order, as a plain call on the event loop. It must not raise and must not wait.
Sink = Callable[[Change], None]


class Watch(Protocol):
    """A running watch."""

    def close(self) -> None:
        """Stop: the sink gets nothing more, not even what is known already. Closing twice is harmless."""


class Discovery(Protocol):
    """Where instances are registered and watched."""

    @property
    def where(self) -> str:
        """The place, for error texts: `file:///tmp/triton-distributed-1000`."""

    async def register(self, instance: Instance) -> None:
        """Make an instance known until it is withdrawn, or until this process ends.

        Registering the same endpoint and id again replaces what was published, metadata included.

        Raises:
            DiscoveryError: it cannot be registered; nothing was.
        """

    async def withdraw(self, instance: Instance) -> None:
        """Take back what `register` published; harmless where nothing was, or another process has replaced it."""

    async def watch(self, endpoint: EndpointName | None, sink: Sink) -> Watch:
        """Give `sink` a `Snapshot` before this returns, and every change from then on.

        Args:
            endpoint: exactly this endpoint, or None for every one.

        Raises:
            DiscoveryError: the place cannot be read.
        """

    async def close(self) -> None:
        """Withdraw what was registered here, stop the watches, release everything. Closing twice is harmless."""


@runtime_checkable
class Marking(Protocol):
    """What a discovery can do beside that whose records can be changed without the event loop."""

    def mark(self, instance: Instance, busy: bool) -> None:
        """Publish that an instance is busy, or no longer. From any thread, also while the event loop is stuck.

        Nothing happens where the instance is not registered here, where another process has replaced it, or where the
        same is published already. What was registered stays registered; registering it again says that it is not busy.

        Raises:
            DiscoveryError: it cannot be published now; what was published before stays.
        """


def same(one: Instance, other: Instance) -> bool:
    """Whether two instances are equal in everything that is published, metadata included."""
    return one == other and one.metadata == other.metadata
