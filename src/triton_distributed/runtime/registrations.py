"""The records in discovery of the endpoints that a runtime serves."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from triton_distributed.discovery import Discovery, Marking
from triton_distributed.discovery.record import BadRecord, encode
from triton_distributed.errors import DiscoveryError
from triton_distributed.names import INSPECT, EndpointName, Instance
from triton_distributed.serving.endpoint import ServedEndpoint
from triton_distributed.serving.server import Server

logger = logging.getLogger("triton_distributed.runtime")


class Registrations:
    """Registers, withdraws and corrects the records of one runtime's endpoints.

    Args:
        loop: the running loop.
        discovery: the discovery in which the instances are registered.
        server: the server of the endpoints; it knows which of their addresses can be reached.
        check: raises if the runtime cannot be used for an operation.
        fixed: discovery is a fixed list, which cannot be changed.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        discovery: Discovery,
        server: Server,
        check: Callable[[str], None],
        *,
        fixed: bool,
    ) -> None:
        self._loop = loop
        self._discovery = discovery
        self._server = server
        self._check = check
        self._fixed = fixed
        self._lock = asyncio.Lock()  # Held during each change of the records.
        self._inspected: Instance | None = None  # The record of the reserved endpoint, while it is listed.
        self._correcting: asyncio.Task[None] | None = None
        self._closed = False

    async def add(self, served: ServedEndpoint) -> None:
        """Register a new endpoint.

        Raises:
            DiscoveryError: the endpoint cannot be registered.
        """
        await self._discovery.register(served.instance)
        served.registered, served.listed = True, served.instance.addresses

    async def remove(self, served: ServedEndpoint) -> None:
        """Withdraw an endpoint."""
        async with self._lock:
            await self._discovery.withdraw(served.instance)
            served.listed = ()
            await self._hide()

    async def pause(self, name: EndpointName) -> None:
        """Take a served endpoint out of rotation; see `Endpoint.pause`."""
        self._find(name, "pause").gate.pause()  # It takes effect at once, before the lock is free.
        async with self._lock:
            served = self._find(name, "pause")
            await self._show(served.instance)
            await self._discovery.withdraw(served.instance)
            served.listed = ()

    async def resume(self, name: EndpointName) -> None:
        """Put a served endpoint back into rotation; see `Endpoint.resume`."""
        self._find(name, "resume")
        async with self._lock:
            served = self._find(name, "resume")
            served.gate.resume()  # The gate must be open before a client can see the instance.
            try:
                await self._list(served)
            except BaseException:
                served.gate.pause()
                raise
            await self._hide()

    async def _show(self, instance: Instance) -> None:
        """List the reserved endpoint, so that `trd` finds this worker although other endpoints are not listed."""
        if self._inspected is None:
            found = replace(instance, endpoint=INSPECT, metadata={}, contract=None)
            try:
                await self._discovery.register(found)
                self._inspected = found
            except DiscoveryError as error:  # `trd` does not find the worker, which matters less than a pause or drain.
                logger.info("cannot list the reserved endpoint in %s: %s", self._discovery.where, error)

    async def _hide(self) -> None:
        """Withdraw the record of the reserved endpoint if no endpoint is paused any more."""
        if self._inspected is not None and not any(each.gate.paused for each in self._server.endpoints):
            try:
                await self._discovery.withdraw(self._inspected)
                self._inspected = None
            except DiscoveryError as error:  # The record does no harm, and the caller's change has succeeded.
                logger.info("cannot withdraw from %s: %s", self._discovery.where, error)

    async def update_metadata(self, name: EndpointName, metadata: Mapping[str, Any]) -> None:
        """Publish other metadata of a served endpoint; see `Endpoint.update_metadata`."""
        async with self._lock:
            served = self._find(name, "update_metadata")
            before = served.instance
            served.instance = replace(before, metadata=copy.deepcopy(dict(metadata)))
            try:
                encode(served.instance)
                if served.listed:  # Otherwise it is published when the endpoint is listed again.
                    await self._list(served)
            except BadRecord as error:
                served.instance = before
                raise DiscoveryError("record", self._discovery.where, str(error)) from error
            except BaseException:
                served.instance = before
                raise

    def _find(self, name: EndpointName, operation: str) -> ServedEndpoint:
        self._check(operation)
        served = self._server.find(name, operation)
        if self._fixed:
            words = f"{operation}: only TRD_STATIC determines which instances exist"
            raise DiscoveryError("static", self._discovery.where, words)
        return served

    async def _list(self, served: ServedEndpoint) -> None:
        """Register an endpoint under the addresses that clients can reach; withdraw it if no client can reach it."""
        addresses = self._server.reached(served.instance.addresses)
        if addresses:
            await self._discovery.register(replace(served.instance, addresses=addresses))
        else:
            await self._discovery.withdraw(served.instance)
        served.listed = addresses

    def correct(self) -> None:
        """After a check of the Unix sockets, correct each record that lists a missing one or lacks an existing one."""
        if not self._closed and self._correcting is None and any(map(self._is_wrong, self._server.endpoints)):
            self._correcting = self._loop.create_task(self._correct())
            self._correcting.add_done_callback(self._corrected)

    def _is_wrong(self, served: ServedEndpoint) -> bool:
        """Whether the addresses that discovery lists for an endpoint differ from those that reach it."""
        wanted = served.registered and not served.gate.paused
        return wanted and served.listed != self._server.reached(served.instance.addresses)

    async def _correct(self) -> None:
        async with self._lock:
            for served in self._server.endpoints:
                if not self._closed and self._is_wrong(served):
                    await self._list(served)

    def _corrected(self, task: asyncio.Task[None]) -> None:
        self._correcting = None
        if not task.cancelled() and (error := task.exception()) is not None:  # The next check tries again.
            logger.info("the addresses in %s could not be corrected: %s", self._discovery.where, error)

    def mark(self, busy: bool) -> None:
        """Publish whether the event loop is stuck. The watchdog calls this in its thread."""
        if isinstance(self._discovery, Marking):
            for served in self._server.endpoints:
                self._discovery.mark(served.instance, busy)

    def close(self) -> None:
        """Stop correcting records."""
        self._closed = True
        if self._correcting is not None:
            self._correcting.cancel()

    async def remove_all(self) -> None:
        """Withdraw all endpoints. An error of discovery is only logged, because running requests must still finish."""
        try:
            async with self._lock:
                for served in self._server.endpoints:
                    await self._discovery.withdraw(served.instance)
                    served.listed = ()
        except Exception as error:  # A backend may raise anything, see above.
            logger.warning("cannot withdraw from %s: %s", self._discovery.where, error)

    @asynccontextmanager
    async def draining(self) -> AsyncIterator[None]:
        """Let `trd` find the worker while its last requests run: an operator asks what holds up a drain.

        The drain waits neither for the record nor for discovery. If the record cannot be withdrawn at the end, it ends
        with the discovery of this process, as the records of a killed process do.
        """
        held_up = any(each.gate.running for each in self._server.endpoints)
        served = next((each for each in self._server.endpoints if each.registered), None)
        showing = None
        if held_up and served is not None and not self._fixed:
            showing = self._loop.create_task(self._show(served.instance))
        try:
            yield
        finally:
            if showing is not None:
                showing.cancel()
                await asyncio.wait({showing})
            if self._inspected is not None:
                try:
                    await self._discovery.withdraw(self._inspected)
                except Exception as error:  # A backend may raise anything, and the process ends now.
                    logger.warning("cannot withdraw from %s: %s", self._discovery.where, error)
