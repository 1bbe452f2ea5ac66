"""Who is measured. A peer serves handlers in one process and calls them from another."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.handlers import Call, Handler


class Peer(Protocol):
    """One process' end of a peer."""

    async def serve(self, service: str, handlers: dict[str, Handler]) -> None:
        """Serve the handlers by their names; returns once they can be called and goes on in the background."""

    async def connect(self, service: str, handler: str) -> Call:
        """What to call with a request. All handlers of a service share a connection where the peer can do that."""


@dataclass(frozen=True)
class Kind:
    """One line-up of a peer: `family` is who, `tcp` whether over TCP on the loopback instead of a Unix socket."""

    family: str
    tcp: bool
    module: str
    needs: str

    def available(self) -> bool:
        """Whether what it needs can be imported here."""
        try:
            return importlib.util.find_spec(self.needs) is not None
        except ModuleNotFoundError:
            return False

    def make(self, directory: Path) -> Peer:
        """The peer's end in this process.

        Args:
            directory: private folder that both ends know: sockets and addresses go there.
        """
        peer: Peer = importlib.import_module(f"benchmarks.peers.{self.module}").make(directory, self.tcp)
        return peer


PEERS = {
    "yardstick": Kind("yardstick", False, "yardstick", "msgspec"),
    "grpc.aio": Kind("grpc.aio", False, "grpc_aio", "grpc"),
    "ours": Kind("ours", False, "ours", "triton_distributed.runtime"),
    "yardstick tcp": Kind("yardstick", True, "yardstick", "msgspec"),
    "grpc.aio tcp": Kind("grpc.aio", True, "grpc_aio", "grpc"),
    "ours tcp": Kind("ours", True, "ours", "triton_distributed.runtime"),
}
