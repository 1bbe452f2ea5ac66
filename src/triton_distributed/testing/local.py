"""Workers and clients in one process: several runtimes on one event loop that find each other without a server."""

from __future__ import annotations

import asyncio
from typing import Any, Self

from triton_distributed.config import Config
from triton_distributed.routing.policies import Policy
from triton_distributed.runtime import Client, DistributedRuntime
from triton_distributed.testing.leftovers import LeftOver
from triton_distributed.testing.virtual_time import waiting

READY_S = 60.0  # Seconds to wait for a registration. It takes milliseconds; a busy machine may need many times that.
POLL_S = 0.001


class LocalCluster:
    """Runtimes on the running loop that find each other. `async with` closes them all.

    The end of the block raises if the program has left an endpoint that ended with an error, or a task that was started
    within the block and still waits.

    Args:
        settings: the settings of every runtime, as arguments of `Config`. By default the runtimes share memory
            discovery, handle no signals and have no watchdog.

    Raises:
        LeftOver: at the end of the block; the text names each task and its line of code.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = {"discovery": "memory", "handle_signals": False, "watchdog_s": 0.0, **settings}
        self._before: set[asyncio.Task[Any]] = set()
        self._caller: DistributedRuntime | None = None
        self._serving: list[asyncio.Task[None]] = []
        self.runtimes: list[DistributedRuntime] = []

    async def __aenter__(self) -> Self:
        self._before = asyncio.all_tasks()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self.close()
        if kind is None and (found := self._left()):
            raise LeftOver(found)

    def runtime(self, **settings: Any) -> DistributedRuntime:
        """Make one more runtime.

        Args:
            settings: settings of this runtime alone, as arguments of `Config`.
        """
        made = DistributedRuntime(asyncio.get_running_loop(), config=Config(**{**self._settings, **settings}))
        self.runtimes.append(made)
        return made

    @property
    def caller(self) -> DistributedRuntime:
        """The runtime of the clients. It serves nothing."""
        if self._caller is None:
            self._caller = self.runtime()
        return self._caller

    async def worker(self, path: str, handler: Any, **options: Any) -> DistributedRuntime:
        """Serve an endpoint on its own runtime. The endpoint is registered when this returns.

        Args:
            path: `namespace.component.endpoint`.
            handler: the handler and the options are those of `serve_endpoint`.

        Returns:
            the runtime, e.g. to close it in the middle of a test.

        Raises:
            TypeError: the handler is invalid; or any other error of `serve_endpoint`.
            TimeoutError: the endpoint was not registered within a minute.
        """
        runtime = self.runtime()
        await self.serve(runtime, path, handler, **options)
        return runtime

    async def serve(self, runtime: DistributedRuntime, path: str, handler: Any, **options: Any) -> asyncio.Task[None]:
        """Serve one more endpoint on a runtime. The endpoint is registered when this returns.

        Returns:
            the task that serves; it ends when the runtime has drained.

        Raises:
            TypeError, TimeoutError: as `worker`.
        """
        task = runtime.endpoint(path).serve_endpoint(handler, **options)
        self._serving.append(task)
        client = await self.caller.endpoint(path).client()
        async with asyncio.timeout(READY_S):
            while not task.done() and runtime.instance_id not in client.instance_ids():  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(POLL_S)
        if task.done():
            task.result()
        return task

    async def client(self, path: str, policy: str | Policy = "round_robin") -> Client:
        """Return a client of a served endpoint.

        Args:
            path: `namespace.component.endpoint`.
            policy: see `Endpoint.client`.

        Raises:
            TimeoutError: no instance was found within a minute.
        """
        client = await self.caller.endpoint(path).client(policy)
        async with asyncio.timeout(READY_S):
            await client.wait_for_instances()
        return client

    async def close(self) -> None:
        """Close all runtimes, the caller first, so that no handler waits for a reader."""
        if self._caller is not None:
            await self._caller.close()
        await asyncio.gather(*(each.close() for each in self.runtimes))

    def _left(self) -> list[str]:
        """Descriptions of the failed endpoints and the tasks that the program has left."""
        found = [
            f"an endpoint ended with {task.exception()!r}"
            for task in self._serving
            if task.done() and not task.cancelled() and task.exception() is not None
        ]
        before = {task.get_name() for task in (*self._before, asyncio.current_task()) if task is not None}
        places = [place for name, place in waiting(asyncio.get_running_loop()) if name not in before]
        return [*found, *(f"a task waits at {place}" for place in places)]
