"""A worker in a thread of its own, for tests that wait without an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import triton_distributed as trd
from tests.timing import PATIENCE_S
from triton_distributed.config import Config


class OtherThread:
    """An event loop in a thread, with a connection that serves endpoints and may call them."""

    def __init__(self, **settings: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="worker")
        self._thread.start()
        self.here: trd.Connection = self.run(self._connected(Config.from_env(**settings)))

    @staticmethod
    async def _connected(config: Config) -> trd.Connection:
        return trd.connect(config)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine there, and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def serve(self, endpoint: Any, handler: Any, **options: Any) -> trd.Served:
        """Serve an endpoint; it can be called when this returns."""
        served: trd.Served = self.run(self.here.serve(endpoint, handler, **options))
        return served

    def close(self) -> None:
        """Close the connection and end the thread."""
        self.run(self.here.close())
        self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()
