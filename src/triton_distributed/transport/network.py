"""Networks besides sockets: the interface for dialling and listening on their addresses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from triton_distributed.system.protocol import StreamProtocol
from triton_distributed.transport.address import Address


class Network(Protocol):
    """Serves the addresses of one scheme."""

    async def connect(self, address: Address, protocol: StreamProtocol) -> None:
        """Connect `protocol` to the worker at `address`.

        Raises:
            OSError: it cannot be reached.
        """

    async def listen(self, address: Address, factory: Callable[[], StreamProtocol]) -> Callable[[], None]:
        """Connect each end that dials `address` to a protocol from `factory`; the returned function stops that.

        Raises:
            OSError: the address cannot be listened on.
        """

    async def close(self) -> None:
        """End all connections."""


class LazyNetwork:
    """A network that is made when it is first dialled or listened on.

    Args:
        make: makes the network.
    """

    def __init__(self, make: Callable[[], Network]) -> None:
        self._make = make
        self._made: Network | None = None

    def _network(self) -> Network:
        if self._made is None:
            self._made = self._make()
        return self._made

    async def connect(self, address: Address, protocol: StreamProtocol) -> None:
        await self._network().connect(address, protocol)

    async def listen(self, address: Address, factory: Callable[[], StreamProtocol]) -> Callable[[], None]:
        return await self._network().listen(address, factory)

    async def close(self) -> None:
        if self._made is not None:
            await self._made.close()


# Networks by scheme; `runtime.backends` makes them.
Networks = Mapping[str, Network]
