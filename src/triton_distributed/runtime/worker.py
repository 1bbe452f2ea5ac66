"""The worker's half of a runtime: endpoints from `serve_endpoint` to the end of their tasks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from triton_distributed.config import Config
from triton_distributed.discovery import Discovery
from triton_distributed.errors import AlreadyServed
from triton_distributed.names import EndpointName, Instance
from triton_distributed.observe import Watchdog
from triton_distributed.runtime.registrations import Registrations
from triton_distributed.runtime.serve_task import ServeTask
from triton_distributed.serving.endpoint import ServedEndpoint
from triton_distributed.serving.handlers import Handler
from triton_distributed.serving.server import AcceptedFactory, Server
from triton_distributed.serving.threads import HandlerThreads
from triton_distributed.system.identity import host_name
from triton_distributed.system.signals import DrainSignals
from triton_distributed.transport.network import Networks
from triton_distributed.transport.tls import SessionTls

logger = logging.getLogger("triton_distributed.runtime")


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How an endpoint is served; see `Endpoint.serve_endpoint`."""

    graceful: bool
    max_inflight: int | None
    max_queue: int
    metadata: Mapping[str, Any]


class Worker:
    """Serves the endpoints of one runtime.

    Args:
        loop: the running loop.
        config: settings.
        discovery: where the endpoints are registered.
        instance_id: of the runtime.
        factory, tls, networks: see `Server`.
        check: raises where the runtime cannot be used for an operation.
        shutdown: begins to shut the runtime down.

    Attributes:
        server: takes the requests of the endpoints.
        registrations: what discovery lists of the endpoints.
        threads: of plain handlers.
        watchdog: of the event loop, once an endpoint is served.
        draining: no further endpoint is served.
        closed: nothing is served any more, or this process is a fork.
        exit: what a handler has raised to end the process.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        config: Config,
        discovery: Discovery,
        instance_id: int,
        factory: AcceptedFactory,
        tls: SessionTls | None,
        networks: Networks,
        check: Callable[[str], None],
        shutdown: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._config = config
        self._discovery = discovery
        self._instance_id = instance_id
        self._shutdown = shutdown
        fixed = config.discovery == "static"  # ids are made from addresses there
        self.server = server = Server(
            loop, config, None if fixed else instance_id, factory, tls, networks, self._addresses_checked
        )
        self.registrations = Registrations(loop, discovery, server, check, fixed=fixed)
        self.threads = HandlerThreads(config.threads)
        self.watchdog = Watchdog(loop, config.watchdog_s, self.registrations.mark)
        self._signals = DrainSignals(loop, shutdown, config.drain_timeout_s, self._running, server.stuck)
        self._starting: set[asyncio.Task[ServedEndpoint]] = set()
        self._tasks: set[ServeTask] = set()  # one an endpoint
        self._stopped: asyncio.Future[None] = loop.create_future()
        self.draining = self.closed = False
        self.exit: SystemExit | None = None

    def _addresses_checked(self) -> None:
        self.registrations.correct()

    def _running(self) -> list[str]:
        return [request.context.id() for endpoint in self.server.endpoints for request in endpoint.gate.running]

    def serve(self, name: EndpointName, function: Callable[..., Any], options: ServeOptions) -> ServeTask:
        """Serve an endpoint; see `Endpoint.serve_endpoint`."""
        if any(each.endpoint == name for each in self._tasks):
            raise AlreadyServed(name.path)
        handler = Handler(function, self.threads)
        if self._config.handle_signals:
            self._signals.install()  # before there is a socket or a record, which a process that is killed would leave
        task = ServeTask(self._serve(name, handler, options), name, self._loop)
        self._tasks.add(task)
        task.add_done_callback(self._served)
        task.awaited = False  # by the program: this callback does not count
        return task

    def _served(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._tasks and not self.draining:
            self._signals.remove()  # a program that goes on without an endpoint ends at a signal, as any other does

    def warn_of_unawaited(self) -> None:
        """The program is about to end: log which endpoints it serves without having awaited them."""
        for task in self._tasks:
            if not self.draining and not task.awaited:
                logger.warning(
                    "%s: serve_endpoint() was not awaited, and the program ends: `await` it to serve until shutdown",
                    task.endpoint,
                )

    async def _serve(self, name: EndpointName, handler: Handler, options: ServeOptions) -> None:
        if self.draining:
            return
        starting = self._loop.create_task(self._start(name, handler, options, asyncio.current_task()))
        self._starting.add(starting)
        starting.add_done_callback(self._starting.discard)
        try:
            served = await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.cancel()
            await asyncio.wait({starting})  # it undoes what it has begun, so that the endpoint is free afterwards
            if not starting.cancelled() and starting.exception() is None and not self.closed:
                await self._stop(starting.result())  # it was through already
            raise
        try:
            await asyncio.shield(self._stopped)
        finally:
            if not self.closed:
                await self._stop(served)
        if self.exit is not None:  # the program must not end by itself before the process ends with the handler's code
            await self._loop.create_future()

    async def _start(
        self, name: EndpointName, handler: Handler, options: ServeOptions, task: asyncio.Task[Any] | None
    ) -> ServedEndpoint:
        server = self.server
        addresses = await server.listen(name, self._instance_id, self._discovery.where)
        served = ServedEndpoint(
            self._loop,
            name,
            handler,
            Instance(name, self._instance_id, addresses, host_name(), options.metadata),
            server.slots,
            max_inflight=options.max_inflight,
            max_queue=options.max_queue,
            graceful=options.graceful,
            on_wait=server.standstill.waits,
            on_exit=self._exit_wanted,
            full_tracebacks=self._config.full_tracebacks,
        )
        served.task = task
        server.add(served)
        self.watchdog.start()
        if self.draining:
            return served  # a signal came meanwhile: clients are not to call it any more
        try:
            await self.registrations.add(served)
        except BaseException:
            server.remove(served)
            raise
        if isinstance(task, ServeTask) and not task.registered.done():
            task.registered.set_result(served.instance)
        return served

    async def _stop(self, served: ServedEndpoint) -> None:
        """The endpoint's task was cancelled: refuse new requests, and cancel those that run."""
        self.server.remove(served)
        served.gate.drain()
        await self.registrations.remove(served)
        await served.cut()

    def _exit_wanted(self, error: SystemExit) -> None:
        """A handler has called `sys.exit`: drain, then end the process with its code."""
        if self.exit is None:
            self.exit = error
            words = "a handler raised SystemExit(%r): this process drains, for at most %g s, and ends"
            logger.warning(words, error.code, self._config.drain_timeout_s)
            self._shutdown()

    async def drain(self, timeout_s: float) -> None:
        """Leave discovery, refuse new requests, and let running handlers finish, at most `timeout_s` seconds."""
        if self._starting:
            await asyncio.wait(self._starting)
        self.registrations.close()
        await self.registrations.remove_all()
        await self.server.drain(timeout_s)

    def close(self) -> None:
        """Close the sessions; what still runs is cancelled."""
        self.closed = True
        self.watchdog.stop()
        self.server.close()

    async def end(self) -> None:
        """Let the threads end, give the signals back, and let the endpoints' tasks be done."""
        self.threads.close()
        self._signals.remove()
        if not self._stopped.done():
            self._stopped.set_result(None)
        if self._tasks and self.exit is None:
            await asyncio.wait(self._tasks)
