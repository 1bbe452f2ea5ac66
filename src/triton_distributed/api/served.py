"""An endpoint that a connection serves."""

from __future__ import annotations

import asyncio

from triton_distributed.names import EndpointName, Instance
from triton_distributed.runtime.component import Endpoint
from triton_distributed.runtime.serve_task import ServeTask


class Served:
    """A served endpoint. It can be called when `here.serve` returns this object.

    Attributes:
        name: the endpoint.
        instance: its record: id, addresses, metadata.
    """

    def __init__(self, endpoint: Endpoint, task: ServeTask, instance: Instance) -> None:
        self._endpoint = endpoint
        self._task = task
        self.instance = instance

    @property
    def name(self) -> EndpointName:
        """The endpoint."""
        return self.instance.endpoint

    async def until_drained(self) -> None:
        """Wait until the endpoint is not served any more.

        A signal, `here.close()` or `stop()` ends it; a drain comes before the end.
        """
        try:
            await asyncio.shield(self._task)
        except asyncio.CancelledError:
            if not self._task.cancelled():
                raise

    async def pause(self) -> None:
        """Withdraw the instance and refuse new requests; running ones go on. See `Endpoint.pause`."""
        await self._endpoint.pause()

    async def resume(self) -> None:
        """Register the instance again and admit requests. See `Endpoint.resume`."""
        await self._endpoint.resume()

    async def stop(self) -> None:
        """Stop serving now: the instance is withdrawn, new requests are refused, and running handlers are cancelled.

        To let running handlers finish, close the connection, which drains; or `pause`, and call this after the last
        request has ended.
        """
        self._task.cancel()
        await self.until_drained()

    def __repr__(self) -> str:
        state = "stopped" if self._task.done() else "serving"
        return f"<Served {self.name} as instance {self.instance.id}, {state}>"
