"""The runtime through its native API: contracts without types, so that only the way to call differs from `ours`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import triton_distributed as trd
from benchmarks.handlers import Call, Handler


class Native:
    """One connection in each process."""

    def __init__(self, directory: Path, tcp: bool) -> None:
        self.here = trd.connect()

    async def serve(self, service: str, handlers: dict[str, Handler]) -> None:
        for name, handler in handlers.items():
            await self.here.serve(_contract(service, name), handler)
        for name in handlers:
            await self.connect(service, name)

    async def connect(self, service: str, handler: str) -> Call:
        here, contract = self.here, _contract(service, handler)
        await here.wait_for_instances(contract)
        return lambda request: here.stream(contract, request)


def _contract(service: str, name: str) -> trd.Stream[Any, Any]:
    return trd.Stream[Any, Any](f"bench.{service}.{name}")


make = Native
