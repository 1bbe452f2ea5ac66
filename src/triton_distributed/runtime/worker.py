"""The worker's half of a runtime: it serves endpoints, from `serve_endpoint` to the end of their tasks."""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any
from weakref import ref

import msgspec

from triton_distributed.config import Config
from triton_distributed.discovery import Discovery
from triton_distributed.errors import AlreadyServed
from triton_distributed.names import EndpointName, Instance
from triton_distributed.observe import RequestStats, Watchdog
from triton_distributed.observe.labels import MOST_SETS, Labels, checked_labels
from triton_distributed.observe.log_format import line_of
from triton_distributed.observe.observer import Observers
from triton_distributed.observe.totals import Totals
from triton_distributed.payload.codec import encode
from triton_distributed.runtime.observing import Observing
from triton_distributed.runtime.registrations import Registrations
from triton_distributed.runtime.serve_task import ServeTask
from triton_distributed.serving.addresses import published_url
from triton_distributed.serving.admission import HandlerSlots
from triton_distributed.serving.endpoint import ServedEndpoint
from triton_distributed.serving.handlers import Handler
from triton_distributed.serving.server import AcceptedFactory, Server
from triton_distributed.serving.signatures import Types
from triton_distributed.serving.threads import HandlerThreads
from triton_distributed.system.identity import host_name
from triton_distributed.system.signals import DrainSignals
from triton_distributed.transport.network import Networks
from triton_distributed.transport.tls import SessionTls

logger = logging.getLogger("triton_distributed.runtime")


class Serving(msgspec.Struct):
    """How an endpoint is served; see `options.ServeOptions`.

    Attributes:
        graceful: running requests may finish in a drain.
        max_inflight: the most handlers that run at once; None for no limit.
        max_queue: the most requests that wait beyond that.
        metadata: plain JSON values to publish with the instance; they are copied.
        contract: the schema to publish with the instance; None for none.
        types: the types of the contract; None to read the handler's annotations.
        interrupt: a running handler is cancelled when its caller leaves or its deadline is over.
        metrics_labels: labels to add to the endpoint's metrics.
        labels: the same, checked.
        canary: the request with which the status port tries the handler; UNSET for none.

    Raises:
        TypeError: the labels are no names with values, or the canary cannot be encoded.
        ValueError: a limit or a label is invalid.
    """

    graceful: bool = True
    max_inflight: int | None = None
    max_queue: int = 0
    metadata: Mapping[str, Any] | None = None
    contract: Mapping[str, Any] | None = None
    types: Types | None = None
    interrupt: bool = True
    metrics_labels: Mapping[str, str] | Iterable[tuple[str, str]] | None = None
    canary: Any = msgspec.UNSET
    labels: Labels = ()

    def __post_init__(self) -> None:
        if self.max_inflight is not None and (type(self.max_inflight) is not int or self.max_inflight < 1):
            raise ValueError(f"max_inflight={self.max_inflight!r}: must be a whole number of at least 1, or None")
        if type(self.max_queue) is not int or self.max_queue < 0:
            raise ValueError(f"max_queue={self.max_queue!r}: must be a whole number of at least 0")
        if self.max_queue and self.max_inflight is None:
            raise ValueError(f"max_queue={self.max_queue}: requests wait only if max_inflight= limits the running ones")
        self.labels = checked_labels(self.metrics_labels)
        if self.canary is not msgspec.UNSET:
            encode(self.canary, "canary")
        # The instance is registered later, and perhaps repeatedly.
        self.metadata = copy.deepcopy(dict(self.metadata or {}))


class Worker:
    """Serves the endpoints of one runtime.

    Args:
        loop: the running loop.
        config: settings.
        discovery: the discovery in which the endpoints are registered.
        instance_id: the runtime's instance id.
        factory, tls, networks: see `Server`.
        check: raises if the runtime cannot be used for an operation.
        shutdown: begins to shut the runtime down.
        observing: the observers of its requests.

    Attributes:
        server: takes the requests of the endpoints.
        registrations: the records of the endpoints in discovery.
        threads: the threads of plain handlers.
        watchdog: watches the event loop, from the first served endpoint on.
        totals: the counters of all endpoints that were ever served, by name and the program's labels.
        draining: no further endpoint is served.
        closed: no endpoint is served any more, or this process is a fork.
        exit: the exception that a handler raised to end the process; None if none did.
        status_url: where the status port of this process listens; empty if it has none.
        replica: the number of this process, if a supervisor has started it.
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
        observing: Observing,
    ) -> None:
        self._loop = loop
        self._config = config
        self._discovery = discovery
        self._instance_id = instance_id
        self._shutdown = shutdown
        self._observing = observing
        fixed = config.backend.fixed  # Then the addresses determine the ids.
        self.server = server = Server(
            loop, config, None if fixed else instance_id, factory, tls, networks, self._addresses_checked
        )
        self.registrations = Registrations(loop, discovery, server, check, fixed=fixed)
        # A loop of virtual time runs plain handlers itself: `testing.virtual_time`.
        self.threads = HandlerThreads(config.threads, getattr(loop, "inline", False))
        self.watchdog = Watchdog(loop, config.watchdog_s, self.registrations.mark, fields=self._fields_now)
        form = partial(line_of, config.log_format)
        self._signals = DrainSignals(
            loop, shutdown, config.drain_timeout_s, self._running, server.stuck, server.remove_files, form
        )
        self.totals: Totals[tuple[EndpointName, Labels], RequestStats] = Totals(RequestStats)
        self._starting: set[asyncio.Task[ServedEndpoint]] = set()
        self._tasks: set[ServeTask] = set()  # One for each endpoint.
        self._stopped: asyncio.Future[None] = loop.create_future()
        self.draining = self.closed = False
        self.exit: SystemExit | None = None
        self.status_url = ""
        self.replica: int | None = None

    def _addresses_checked(self) -> None:
        self.registrations.correct()

    def _running(self) -> list[str]:
        return [request.context.id() for endpoint in self.server.endpoints for request in endpoint.gate.running]

    def _fields_now(self) -> dict[str, str]:
        """The log's fields for the request whose handler has the loop now, also in another thread."""
        task = asyncio.current_task(self._loop)
        for endpoint in list(self.server.endpoints):
            for request in list(endpoint.gate.running):
                if task is not None and request.task is task:
                    return endpoint.log_fields(request.context)
        return {}

    def serve(self, name: EndpointName, function: Callable[..., Any], serving: Serving) -> ServeTask:
        """Serve an endpoint; see `Endpoint.serve_endpoint`."""
        if any(each.endpoint == name for each in self._tasks):
            raise AlreadyServed(name.path)
        self._check_labels(name, serving.labels)
        handler = Handler(function, self.threads, serving.types)
        if handler.takes_stream and serving.canary is not msgspec.UNSET:
            raise TypeError(f"{name}: canary= is one request, and this handler takes a stream of requests")
        self._observing.look()
        if self._config.handle_signals:
            # Before a socket or a record exists, because a killed process would leave it.
            self._signals.install()
        task = ServeTask(self._serve(name, handler, serving), name, self._loop)
        self._tasks.add(task)
        task.add_done_callback(self._served)
        task.awaited = False  # Only the program's own use counts, and not this callback.
        return task

    def _check_labels(self, name: EndpointName, labels: Labels) -> None:
        known = {each for endpoint, each in self.totals.keys if endpoint == name}
        if labels not in known and len(known) >= MOST_SETS:
            words = f"{name} was served with {MOST_SETS} different labels before, and their counters stay"
            raise ValueError(f"metrics_labels={dict(labels)!r}: {words}: give labels values from a small set")

    def reserve(
        self, name: EndpointName, handler: Callable[[], Callable[..., Any]], max_inflight: int, max_queue: int
    ) -> None:
        """Serve an endpoint of the runtime itself: it is not listed, and its requests take no place of others.

        Args:
            handler: makes the handler when the first request comes.
        """

        def make() -> ServedEndpoint:
            serving = Serving(graceful=False, max_inflight=max_inflight, max_queue=max_queue)
            instance = Instance(name, self._instance_id, ())
            slots = HandlerSlots(self._config.max_streams)
            return self._endpoint(instance, Handler(handler(), self.threads), serving, slots, Observers())

        self.server.reserve(name, make)

    def _endpoint(
        self, instance: Instance, handler: Handler, serving: Serving, slots: HandlerSlots, observers: Observers
    ) -> ServedEndpoint:
        return ServedEndpoint(
            self._loop,
            instance.endpoint,
            handler,
            instance,
            slots,
            max_inflight=serving.max_inflight,
            max_queue=serving.max_queue,
            graceful=serving.graceful,
            interrupt=serving.interrupt,
            on_wait=self.server.standstill.waits,
            on_exit=self._exit_wanted,
            full_tracebacks=self._config.full_tracebacks,
            observers=observers,
            labels=serving.labels,
        )

    def _served(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._tasks and not self.draining:
            self._signals.remove()  # A program that goes on without an endpoint ends at a signal, like any other.

    def warn_of_unawaited(self) -> None:
        """Log the served endpoints that the program has not awaited. Called when the program is about to end."""
        for task in self._tasks:
            if not self.draining and not task.awaited:
                logger.warning(
                    "%s: serve_endpoint() was not awaited and the program ends: `await` it to serve until shutdown",
                    task.endpoint,
                )

    async def _serve(self, name: EndpointName, handler: Handler, serving: Serving) -> None:
        if self.draining:
            return
        starting = self._loop.create_task(self._start(name, handler, serving, asyncio.current_task()))
        self._starting.add(starting)
        starting.add_done_callback(self._starting.discard)
        try:
            served = await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.cancel()
            await asyncio.wait({starting})  # The start undoes its work, so that the endpoint can be served again.
            if not starting.cancelled() and starting.exception() is None and not self.closed:
                await self._stop(starting.result())  # The start was complete already.
            raise
        try:
            await asyncio.shield(self._stopped)
        finally:
            if not self.closed:
                await self._stop(served)
            ended = ", ".join(f"{count:,} {outcome}" for outcome, count in served.stats.outcomes().items() if count)
            logger.info(
                "%s: not served any more by instance %d; requests: %s", name, served.instance.id, ended or "none"
            )
        if self.exit is not None:  # The program must not end before the process ends with the handler's exit code.
            await self._loop.create_future()

    async def _start(
        self, name: EndpointName, handler: Handler, serving: Serving, task: asyncio.Task[Any] | None
    ) -> ServedEndpoint:
        server = self.server
        addresses = await server.listen(name, self._instance_id, self._discovery.where)
        instance = Instance(
            name,
            self._instance_id,
            addresses,
            host_name(),
            serving.metadata or {},
            contract=serving.contract,
            status_url=await published_url(self._loop, self._config, self.status_url),
            pid=os.getpid(),
            since=time.time(),
        )
        served = self._endpoint(instance, handler, serving, server.slots, self._observing)
        served.task, served.canary = task, serving.canary
        server.add(served)
        self.totals.add((name, served.labels), served.stats, _is_gone(ref(served), server))
        self.watchdog.start()
        if self.draining:
            return served  # A signal came meanwhile, so the endpoint is not registered.
        try:
            await self.registrations.add(served)
        except BaseException:
            server.remove(served)
            raise
        logger.info("%s: serving as instance %d at %s", name, served.instance.id, ", ".join(addresses))
        if isinstance(task, ServeTask) and not task.registered.done():
            task.registered.set_result(served.instance)
        return served

    async def _stop(self, served: ServedEndpoint) -> None:
        """Stop an endpoint whose task was cancelled: refuse new requests and cancel running ones."""
        self.server.remove(served)
        served.gate.drain()
        await self.registrations.remove(served)
        await served.cut()

    def _exit_wanted(self, error: SystemExit) -> None:
        """Drain after a handler has called `sys.exit`, then end the process with its exit code."""
        if self.exit is None:
            self.exit = error
            words = "a handler raised SystemExit(%r): this process drains for at most %g s, then ends"
            logger.warning(words, error.code, self._config.drain_timeout_s)
            self._shutdown()

    async def drain(self, timeout_s: float) -> None:
        """Leave discovery, refuse new requests, and let running handlers finish within `timeout_s` seconds."""
        if self._starting:
            await asyncio.wait(self._starting)
        self.registrations.close()
        await self.registrations.remove_all()
        async with self.registrations.draining():
            await self.server.drain(timeout_s)

    def close(self) -> None:
        """Close the sessions and cancel the requests that still run."""
        self.closed = True
        self.watchdog.stop()
        self.server.close()

    async def end(self) -> None:
        """End the threads, remove the signal handlers, and wait for the endpoints' tasks to end."""
        self.threads.close()
        self._signals.remove()
        if not self._stopped.done():
            self._stopped.set_result(None)
        if self._tasks and self.exit is None:
            await asyncio.wait(self._tasks)


def _is_gone(endpoint: ref[ServedEndpoint], server: Server) -> Callable[[], bool]:
    return lambda: endpoint() not in server.endpoints
