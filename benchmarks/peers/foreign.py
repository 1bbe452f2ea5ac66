"""The foreign peers: what `make bench-peers` measures beside ours, each with the packages of an environment of its own.

A module of a foreign peer has `make`, as every peer's, and may have `around(directory)`: an asynchronous context
manager that runs the servers which worker and client need. The peer itself may be `Hosting` or `Closing`.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from benchmarks import environments
from benchmarks.peers import PEERS, Kind
from harness.processes import ROOT


@runtime_checkable
class Hosting(Protocol):
    """A peer that runs handlers in processes of its own, so that it needs no worker."""

    async def host(self, shape: str) -> Sequence[Any]:
        """Start them: one that serves every handler, or a `chain`. Return what stands for the workers."""


@runtime_checkable
class Closing(Protocol):
    """A peer whose client must close something before the servers end."""

    async def close(self) -> None:
        """Close it."""


@dataclass(frozen=True)
class Foreign(Kind):
    """A peer with an environment of its own. In its settings, `{place}` stands for the folder of a measurement.

    Args:
        environment: the name of its file in benchmarks/environments.
    """

    environment: str = ""

    @property
    def python(self) -> str:
        return environments.python(self.environment)

    def environ(self, place: Path) -> dict[str, str]:
        return {name: value.format(place=place) for name, value in super().environ(place).items()}

    def missing(self) -> str | None:
        """Make the environment; return why that is impossible, or None."""
        try:
            environments.make(self.environment)
        except environments.NotInstalled as error:
            return str(error)
        return None

    def stderr(self, place: Path) -> Path:
        return place / "stderr"


_DYNAMO = {
    "DYN_FILE_KV": "{place}/dynamo",
    "DYN_LOG": "off",
    "DYN_REQUEST_PLANE_CODEC": "msgpack",
    "DYN_TCP_MAX_MESSAGE_SIZE": str(64 << 20),
    "DYN_TCP_RPC_HOST": "127.0.0.1",
}
_RAY = {
    "PYTHONPATH": str(ROOT),
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
}
_SERVE = {
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(64 << 20),
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
}
FOREIGN = {
    "nats-py": Foreign("nats-py", True, "nats_py", "nats", lacks=("cancel",), environment="nats-py"),
    "SSE": Foreign("SSE", False, "sse", "starlette", environment="sse"),
    "Dynamo": Foreign("Dynamo", True, "dynamo", "dynamo", environment="dynamo", settings=_DYNAMO),
    "Dynamo, pushed": Foreign(
        "Dynamo", True, "dynamo_push", "dynamo", lacks=("cancel",), environment="dynamo", settings=_DYNAMO
    ),
    "Ray actor": Foreign("Ray", True, "on_ray", "ray", environment="ray", settings=_RAY, apart=True),
    "Ray Serve": Foreign("Ray", True, "on_ray", "ray", environment="ray", settings=_RAY | _SERVE, apart=True),
}
EVERY: dict[str, Kind] = {**PEERS, **FOREIGN}


def servers(module: str, directory: Path) -> AbstractAsyncContextManager[None]:
    """Return a context with the servers that a peer needs beside its worker and its client.

    Args:
        module: the name of the peer's module.
    """
    found = importlib.import_module(f"benchmarks.peers.{module}")
    return found.around(directory) if hasattr(found, "around") else nullcontext()
