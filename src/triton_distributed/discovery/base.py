"""The interface of every discovery backend: register, withdraw, and watch one snapshot followed by changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import msgspec

from triton_distributed.names import EndpointName, Instance


class Snapshot(msgspec.Struct, frozen=True):
    """All instances that exist now. It replaces all earlier knowledge."""

    instances: tuple[Instance, ...]


class Added(msgspec.Struct, frozen=True):
    """An instance is new or has changed. It replaces the instance with the same endpoint and id."""

    instance: Instance


class Removed(msgspec.Struct, frozen=True):
    """An instance is gone: it was withdrawn, or its process has died."""

    endpoint: EndpointName
    instance_id: int


Change = Snapshot | Added | Removed

#: A function that receives each change in order, as a plain call on the event loop. It must not raise or wait.
Sink = Callable[[Change], None]


class Watch(Protocol):
    """A running watch."""

    def close(self) -> None:
        """Stop the watch: the sink gets no further change, not even a known one. Closing twice is harmless."""


class Discovery(Protocol):
    """A backend in which instances are registered and watched."""

    @property
    def where(self) -> str:
        """The backend's address, for error texts, e.g. `file:///tmp/triton-distributed-1000`."""

    async def register(self, instance: Instance) -> None:
        """Publish an instance until it is withdrawn or this process ends.

        Registering the same endpoint and id again replaces the published record, including its metadata.

        Raises:
            DiscoveryError: the instance cannot be registered; nothing has changed.
        """

    async def withdraw(self, instance: Instance) -> None:
        """Remove what `register` published. Harmless if nothing was published or another process has replaced it."""

    async def watch(self, endpoint: EndpointName | None, sink: Sink) -> Watch:
        """Give `sink` a `Snapshot` before this returns, and every change from then on.

        Args:
            endpoint: the endpoint to watch; None for all.

        Raises:
            DiscoveryError: the backend cannot be read.
        """

    async def close(self) -> None:
        """Withdraw the instances registered here, stop the watches, release everything. Closing twice is harmless."""


@runtime_checkable
class Marking(Protocol):
    """The additional interface of a discovery that can change records without the event loop."""

    def mark(self, instance: Instance, busy: bool) -> None:
        """Publish whether an instance is busy. May be called from any thread, even while the event loop is stuck.

        Nothing happens if the instance is not registered here, if another process has replaced it, or if the same state
        is already published. The instance stays registered. Registering it again publishes that it is not busy.

        Raises:
            DiscoveryError: the state cannot be published now; the former record stays.
        """


@runtime_checkable
class Answering(Protocol):
    """The additional interface of a discovery that may be away, such as a server. Any thread may read it.

    Attributes:
        answers: False after it could not be reached, until it answers again. The known instances stay meanwhile.
        answered_at: when it last answered, on `time.monotonic`; 0 before it was first used.
    """

    @property
    def answers(self) -> bool: ...

    @property
    def answered_at(self) -> float: ...


def same(one: Instance, other: Instance) -> bool:
    """Whether two instances are equal in all published values, including metadata."""
    return (
        one == other
        and one.metadata == other.metadata
        and one.contract == other.contract
        and one.status_url == other.status_url
    )
