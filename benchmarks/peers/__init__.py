"""The peers that are measured. A peer serves handlers in one process and calls them from another."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.handlers import Call, Handler


class Peer(Protocol):
    """One process's end of a peer."""

    async def serve(self, service: str, handlers: dict[str, Handler]) -> None:
        """Serve the handlers by their names, in the background. Return when they can be called."""

    async def connect(self, service: str, handler: str) -> Call:
        """Return a function that makes calls. All handlers of a service share a connection if the peer can do that."""


@dataclass(frozen=True)
class Kind:
    """One variant of a peer.

    Args:
        family: the name of the peer.
        tcp: whether it uses TCP on the loopback instead of a Unix socket.
        module: its module in this folder.
        needs: the package that it needs.
        only: the workloads to run with it; if empty, all.
        lacks: the workloads that it cannot run.
        leaves: whether leaving the `async for` of a call ends the call. If not, its task must be cancelled.
    """

    family: str
    tcp: bool
    module: str
    needs: str
    only: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    leaves: bool = True

    def runs(self, workload: str) -> bool:
        """Whether to measure this workload."""
        return workload not in self.lacks and (not self.only or workload in self.only)

    def available(self) -> bool:
        """Whether the package that it needs can be imported here."""
        try:
            return importlib.util.find_spec(self.needs) is not None
        except ModuleNotFoundError:
            return False

    def make(self, directory: Path) -> Peer:
        """Make the peer's end in this process.

        Args:
            directory: a private folder that both ends know, for sockets and addresses.
        """
        peer: Peer = importlib.import_module(f"benchmarks.peers.{self.module}").make(directory, self.tcp)
        return peer


CORE = ("alone", "concurrent", "streams", "array")
"""The workloads of what differs from another peer only in its socket or in the way to call."""

PEERS = {
    "yardstick": Kind("yardstick", False, "yardstick", "msgspec", lacks=("cancel", "hello", "import")),
    "grpc.aio": Kind("grpc.aio", False, "grpc_aio", "grpc", leaves=False),
    "ours": Kind("ours", False, "ours", "triton_distributed.runtime"),
    "native": Kind("native", False, "native", "triton_distributed.api", only=CORE),
    "yardstick tcp": Kind("yardstick", True, "yardstick", "msgspec", only=CORE),
    "grpc.aio tcp": Kind("grpc.aio", True, "grpc_aio", "grpc", only=CORE, leaves=False),
    "ours tcp": Kind("ours", True, "ours", "triton_distributed.runtime", only=CORE),
}
