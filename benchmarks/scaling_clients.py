"""Clients that watch one endpoint: `python -m benchmarks.scaling_clients NUMBER ETCD_URL`. See scaling.py."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

from harness.processes import answer_questions
from triton_distributed.config import Config
from triton_distributed.runtime import Client, DistributedRuntime

ENDPOINT = "scaling.backend.generate"


class Watching:
    """One client in its own runtime, and when its table last had a certain size."""

    def __init__(self, runtime: DistributedRuntime, client: Client) -> None:
        self.runtime, self.client = runtime, client
        self.changed = asyncio.Event()
        self.at = 0.0
        client.candidates.table.listeners.append(self._change)

    def _change(self) -> None:
        self.at = time.monotonic()
        self.changed.set()

    async def until(self, count: int) -> float:
        """Return when the table reached `count` instances, on the clock that all processes share."""
        while len(self.client.instance_ids()) != count:
            self.changed.clear()
            await self.changed.wait()
        return self.at


async def main(url: str) -> None:
    watching: list[Watching] = []

    async def start() -> None:
        runtime = DistributedRuntime(config=Config.from_env({"ETCD_ENDPOINTS": url, "TRD_CONNECT_TIMEOUT_S": "60"}))
        watching.append(Watching(runtime, await runtime.endpoint(ENDPOINT).client()))

    async def answer(question: str, **arguments: Any) -> Any:
        if question == "open":
            await asyncio.gather(*(start() for _ in range(arguments["clients"])))
            return {}
        return {"at": await asyncio.gather(*(each.until(arguments["count"]) for each in watching))}

    await answer_questions(answer)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[2]))
