"""The peers that are measured. A peer serves handlers in one process and calls them from another."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks.handlers import Call, Handler
from harness.processes import ROOT


class Peer(Protocol):
    """One process's end of a peer."""

    async def serve(self, service: str, handlers: dict[str, Handler]) -> None:
        """Serve the handlers by their names, in the background. Return when they can be called."""

    async def connect(self, service: str, handler: str) -> Call:
        """Return a function that makes calls. All handlers of a service share a connection if the peer can do that."""


@functools.cache
def compiled_build() -> Path | None:
    """Return the folder of the compiled build; None if there is none of these very sources."""
    tool = ROOT / "tools" / "compiled.py"
    if not tool.exists():
        return None
    told = subprocess.run([sys.executable, tool], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    return Path(told) if told else None


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
        compiled: whether it runs our compiled build; None: if there is one. Every other peer runs src/.
        settings: environment variables of its processes.
        apart: whether its idle processes are busy, so that it is measured apart from the others.
    """

    family: str
    tcp: bool
    module: str
    needs: str
    only: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    leaves: bool = True
    compiled: bool | None = False
    settings: Mapping[str, str] = field(default_factory=dict)
    apart: bool = False

    @property
    def python(self) -> str:
        """The interpreter of its processes."""
        return sys.executable

    def environ(self, place: Path) -> dict[str, str]:
        """Return the environment variables of its processes for a measurement with this folder."""
        listen = {"TRD_LISTEN": "tcp://127.0.0.1:0"} if self.tcp else {}
        build = None if self.compiled is False else compiled_build()
        python = {
            "PYTHONPATH": str(build or ""),
            "PYTHONDONTWRITEBYTECODE": "",
        }  # Bytecode is cached, as users have it.
        return {"TRD_DIR": str(place), **python, **listen, **self.settings}

    def stderr(self, place: Path) -> Path | None:
        """Return the file for what its processes log; None for this process's stderr."""
        return None

    def runs(self, workload: str) -> bool:
        """Whether to measure this workload."""
        return workload not in self.lacks and (not self.only or workload in self.only)

    def missing(self) -> str | None:
        """Return what it needs and what is not here; None if it can be measured."""
        try:
            found = importlib.util.find_spec(self.needs) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            return f"{self.needs} is not installed here"
        if self.compiled and compiled_build() is None:
            return "there is no compiled build of these sources"
        return None

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
    "yardstick": Kind("yardstick", False, "yardstick", "msgspec", lacks=("cancel", "hello", "import", "scrape")),
    "grpc.aio": Kind("grpc.aio", False, "grpc_aio", "grpc", lacks=("scrape",), leaves=False),
    "ours": Kind("ours", False, "ours", "triton_distributed.runtime"),
    "ours-compiled": Kind("ours", False, "ours", "triton_distributed.runtime", compiled=True),
    "bare": Kind("bare", False, "bare", "uvloop", only=("array",)),
    "ours-socket": Kind(
        "ours",
        False,
        "ours",
        "triton_distributed.runtime",
        only=("unary", "array", "gigabyte"),
        compiled=None,
        settings={"TRD_SHARED_MEMORY_BYTES": "0"},
    ),
    # Its `array` would be a stream, which copies the request; `ours` makes a call.
    "native": Kind("native", False, "native", "triton_distributed.api", only=("alone", "concurrent", "streams")),
    "traced": Kind("ours", False, "traced", "opentelemetry", only=("alone", "concurrent", "streams")),
    "yardstick tcp": Kind("yardstick", True, "yardstick", "msgspec", only=CORE),
    "grpc.aio tcp": Kind("grpc.aio", True, "grpc_aio", "grpc", only=CORE, leaves=False),
    "ours tcp": Kind("ours", True, "ours", "triton_distributed.runtime", only=CORE),
}
