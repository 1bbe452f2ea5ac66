"""DistributedRuntime: one process's part, put together from what `runtime.backends` chooses."""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import threading
from asyncio import _get_running_loop as _running_loop  # C in asyncio and uvloop alike, and public in all but its name
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from threading import get_ident
from typing import Any

from triton_distributed.calling.candidates import EndpointView
from triton_distributed.calling.prober import Prober
from triton_distributed.config import Config
from triton_distributed.discovery import Discovery, Marking
from triton_distributed.errors import AlreadyServed, DiscoveryError, ForkError, RuntimeClosed, WrongLoop
from triton_distributed.names import MAX_INSTANCE_ID, EndpointName, Instance
from triton_distributed.observe import LoopStats, Stats, Watchdog
from triton_distributed.runtime.backends import (
    make_discovery,
    make_elsewhere,
    make_events,
    make_nats,
    make_networks,
    make_tls,
)
from triton_distributed.runtime.component import Endpoint, Namespace
from triton_distributed.runtime.events import RuntimeEvents
from triton_distributed.runtime.serve_task import ServeTask
from triton_distributed.runtime.sessions import Sessions
from triton_distributed.runtime.token import CancellationToken
from triton_distributed.serving.endpoint import CUT_S, ServedEndpoint
from triton_distributed.serving.handlers import Handler
from triton_distributed.serving.server import Server
from triton_distributed.serving.threads import HandlerThreads
from triton_distributed.system.fork import watch_forks
from triton_distributed.system.identity import host_name
from triton_distributed.system.signals import DrainSignals
from triton_distributed.transport.network import Networks
from triton_distributed.transport.pool import SessionPool

logger = logging.getLogger("triton_distributed.runtime")

NOT_WHILE_CLOSING = ("serve_endpoint", "resume")  # what would register again while everything leaves


class DistributedRuntime:
    """One process's part in the distributed system: it serves endpoints, calls them, or both.

    Args:
        event_loop: the running loop, the default.
        config: settings; by default those of the environment.
        discovery: in place of what the settings name, e.g. a test's own; it is closed with the runtime.
        networks: by scheme, what serves addresses beside sockets and what the settings name.

    Raises:
        ConfigError: a setting cannot be used.
        RuntimeError: no loop is running.

    Connecting is left to the first call that needs it, which then says what is wrong and where. `triton_worker` makes
    and closes one; otherwise `await runtime.close()`.
    """

    def __init__(
        self,
        event_loop: asyncio.AbstractEventLoop | None = None,
        *,
        config: Config | None = None,
        discovery: Discovery | None = None,
        networks: Networks | None = None,
    ) -> None:
        self._loop = event_loop or asyncio.get_running_loop()
        self._thread = threading.current_thread()
        self.config = config = config or Config.from_env()
        # A loop of virtual time has its own, so that a run repeats itself: see `testing.virtual_time`.
        self.rng: random.Random = getattr(self._loop, "rng", None) or random.Random()
        self.instance_id = self.rng.randint(1, MAX_INSTANCE_ID)
        self.discovery = make_discovery(config) if discovery is None else discovery
        self._elsewhere = make_elsewhere(config) if discovery is None else None
        self.nats = make_nats(config)
        self.events = RuntimeEvents(
            lambda: make_events(config, self.nats, self.instance_id),
            self.nats if config.nats_urls else None,
            self.instance_id,
            config.max_message_bytes,
        )
        tls = make_tls(config)
        sessions = Sessions(self._loop, config, self.rng)
        self._networks = {**make_networks(self._loop, config, self.nats), **(networks or {})}
        self._views: dict[EndpointName, EndpointView] = {}
        self._opening: dict[EndpointName, asyncio.Task[EndpointView]] = {}
        self.prober = Prober(self._loop, _Values(self._views))
        self.pool = SessionPool(
            self._loop,
            sessions.dialled,
            config.connect_timeout_s,
            lambda addresses, _: self.prober.lost(addresses, self.pool),
            config.health_timeout_s,
            config.host_timeout_s,
            tls,
            self._networks,
        )
        self._threads = HandlerThreads(config.threads)
        self._server = Server(
            self._loop,
            config,
            None if config.discovery == "static" else self.instance_id,
            sessions.accepted,
            tls,
            self._networks,
            self._looked,
        )
        self._listing = asyncio.Lock()  # around each change of what discovery says of the endpoints
        self._relisting: asyncio.Task[None] | None = None
        self._watchdog = Watchdog(self._loop, config.watchdog_s, self._mark)
        self._signals = DrainSignals(
            self._loop, self.shutdown, config.drain_timeout_s, self._running, self._server.stuck
        )
        self._token = CancellationToken()
        self._tasks: dict[asyncio.Task[Any], None] = {}  # in order; bounded by calls, clients and endpoints
        self._starting: set[asyncio.Task[ServedEndpoint]] = set()
        self._serving: set[ServeTask] = set()
        self._stopped: asyncio.Future[None] = self._loop.create_future()
        self._closing: asyncio.Task[None] | None = None
        self._exit: SystemExit | None = None  # what a handler has raised
        self._forked = False
        self.unusable = False
        watch_forks(self)

    # names

    def namespace(self, name: str) -> Namespace:
        """A namespace; no I/O.

        Raises:
            InvalidName: `name` cannot name one.
        """
        return Namespace(self, name)

    def endpoint(self, path: str) -> Endpoint:
        """An endpoint by its shorthand `namespace.component.endpoint`, with or without `dyn://`; no I/O.

        Raises:
            InvalidName: it does not have exactly three parts.
        """
        return Endpoint(self, EndpointName.parse(path))

    def event_loop(self) -> asyncio.AbstractEventLoop:
        """The loop that everything runs on."""
        return self._loop

    def primary_token(self) -> CancellationToken:
        """The token that `shutdown` cancels."""
        return self._token

    def child_token(self) -> CancellationToken:
        """A token that is cancelled with the primary one, or alone."""
        return self._token.child_token()

    def stats(self) -> dict[str, Stats]:
        """The counters of each served endpoint by its path."""
        return {each.name.path: each.stats for each in self._server.endpoints}

    @property
    def loop_stats(self) -> LoopStats:
        """How the event loop fares; counted from the first endpoint that is served, where `TRD_WATCHDOG_S` is not 0."""
        return self._watchdog.stats

    # serving

    def serve(
        self,
        name: EndpointName,
        function: Callable[..., Any],
        *,
        graceful: bool,
        max_inflight: int | None,
        max_queue: int,
        metadata: Mapping[str, Any],
    ) -> ServeTask:
        """Serve an endpoint; see `Endpoint.serve_endpoint`."""
        self.check("serve_endpoint")
        if any(each.endpoint == name for each in self._serving):
            raise AlreadyServed(name.path)
        handler = Handler(function, self._threads)
        if self.config.handle_signals:
            self._signals.install()  # before there is a socket or a record, which a process that is killed would leave
        work = self._serve(name, handler, graceful, max_inflight, max_queue, metadata)
        task = ServeTask(work, name, self._loop)
        self._serving.add(task)
        task.add_done_callback(self._served)
        task.awaited = False  # by the program: this callback does not count
        return task

    def _served(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        if not self._serving and self._closing is None:
            self._signals.remove()  # a program that goes on without an endpoint ends at a signal, as any other does

    def warn_of_unawaited(self) -> None:
        """The program is about to end: say which endpoints it serves without having awaited them."""
        for task in self._serving:
            if self._closing is None and not task.awaited:
                logger.warning(
                    "%s: serve_endpoint() was not awaited, and the program ends: `await` it to serve until shutdown",
                    task.endpoint,
                )

    async def _serve(
        self,
        name: EndpointName,
        handler: Handler,
        graceful: bool,
        max_inflight: int | None,
        max_queue: int,
        metadata: Mapping[str, Any],
    ) -> None:
        if self._closing is not None:
            return
        limits = {"max_inflight": max_inflight, "max_queue": max_queue, "graceful": graceful}
        task = asyncio.current_task()
        starting = self._loop.create_task(self._start_serving(name, handler, metadata, limits, task))
        self._starting.add(starting)
        starting.add_done_callback(self._starting.discard)
        try:
            served = await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.cancel()
            await asyncio.wait({starting})  # it undoes what it has begun, so that the endpoint is free afterwards
            if not starting.cancelled() and starting.exception() is None and not self.unusable:
                await self._stop_serving(starting.result())  # it was through already
            raise
        try:
            await asyncio.shield(self._stopped)
        finally:
            if not self.unusable:
                await self._stop_serving(served)
        if self._exit is not None:  # the program must not end by itself before the process ends as it was told
            await self._loop.create_future()

    def _exit_wanted(self, error: SystemExit) -> None:
        """A handler has called `sys.exit`: drain, then end the process as it says."""
        if self._exit is None:
            self._exit = error
            words = "a handler raised SystemExit(%r): this process drains, for at most %g s, and ends"
            logger.warning(words, error.code, self.config.drain_timeout_s)
            self.shutdown()

    async def _start_serving(
        self,
        name: EndpointName,
        handler: Handler,
        metadata: Mapping[str, Any],
        limits: dict[str, Any],
        task: asyncio.Task[Any] | None,
    ) -> ServedEndpoint:
        addresses = await self._server.listen(name, self.instance_id, self.discovery.where)
        instance = Instance(name, self.instance_id, addresses, host_name(), metadata)
        server = self._server
        served = ServedEndpoint(
            self._loop,
            name,
            handler,
            instance,
            server.slots,
            on_wait=server.standstill.waits,
            on_exit=self._exit_wanted,
            full_tracebacks=self.config.full_tracebacks,
            **limits,
        )
        served.task = task
        self._server.add(served)
        self._watchdog.start()
        if self._closing is not None:
            return served  # a signal came meanwhile: nobody is to call it any more
        try:
            await self.discovery.register(instance)
        except BaseException:
            self._server.remove(served)
            raise
        served.registered, served.listed = True, addresses
        return served

    async def set_listed(self, name: EndpointName, listed: bool) -> None:
        """Take a served endpoint out of rotation, or back into it; see `Endpoint.pause`."""
        operation = "resume" if listed else "pause"
        self.check(operation)
        served = self._server.find(name, operation)
        if self.config.discovery == "static":
            raise DiscoveryError("static", self.discovery.where, f"{operation}: TRD_STATIC alone says who is there")
        if not listed:
            served.gate.pause()  # at once, whatever the lock waits for
        async with self._listing:
            self.check(operation)
            served = self._server.find(name, operation)
            if not listed:
                await self.discovery.withdraw(served.instance)
                served.listed = ()
                return
            served.gate.resume()  # before a client can see the instance
            try:
                await self._list(served)
            except BaseException:
                served.gate.pause()
                raise

    async def _list(self, served: ServedEndpoint) -> None:
        """Register an endpoint under those addresses that clients reach; take it back where there is none."""
        addresses = self._server.reached(served.instance.addresses)
        if addresses:
            await self.discovery.register(replace(served.instance, addresses=addresses))
        else:
            await self.discovery.withdraw(served.instance)
        served.listed = addresses

    def _looked(self) -> None:
        """The Unix sockets were looked at: a record must not name one that is not there."""
        if self._closing is None and self._relisting is None and any(map(self._misses, self._server.endpoints)):
            self._relisting = self._loop.create_task(self._relist())
            self._relisting.add_done_callback(self._relisted)

    def _misses(self, served: ServedEndpoint) -> bool:
        """Whether discovery lists an endpoint otherwise than it is reached."""
        wanted = served.registered and not served.gate.paused
        return wanted and served.listed != self._server.reached(served.instance.addresses)

    async def _relist(self) -> None:
        async with self._listing:
            for served in self._server.endpoints:
                if self._closing is None and self._misses(served):
                    await self._list(served)

    def _relisted(self, task: asyncio.Task[None]) -> None:
        self._relisting = None
        if not task.cancelled() and (error := task.exception()) is not None:  # the next look tries again
            logger.info("the addresses in %s are not what they should be: %s", self.discovery.where, error)

    async def _stop_serving(self, served: ServedEndpoint) -> None:
        """Its task was cancelled: nobody comes in any more, and what runs is cut."""
        self._server.remove(served)
        served.gate.drain()
        async with self._listing:
            await self.discovery.withdraw(served.instance)
        await served.cut()

    def _mark(self, busy: bool) -> None:
        """In the watchdog's thread: have clients know whether the loop is stuck."""
        if isinstance(self.discovery, Marking):
            for served in self._server.endpoints:
                self.discovery.mark(served.instance, busy)

    def _running(self) -> list[str]:
        return [request.context.id() for endpoint in self._server.endpoints for request in endpoint.gate.running]

    # calling

    async def candidates(self, name: EndpointName) -> EndpointView:
        """The instances of an endpoint that may be called, shared by all clients of the endpoint.

        Raises:
            DiscoveryError: the place where instances are registered cannot be read.
            ForkError, RuntimeClosed.
        """
        self.check("client")
        view = self._views.get(name)
        if view is None:
            task = self._opening.get(name)
            if task is None:
                task = self._opening[name] = self.spawn(self._open_view(name))
                task.add_done_callback(lambda _: self._opening.pop(name, None))
            view = await asyncio.shield(task)
        return view

    async def _open_view(self, name: EndpointName) -> EndpointView:
        view = EndpointView(
            name,
            self._loop,
            self.rng,
            self.pool.ask,
            lambda addresses: self.pool.get(addresses) is not None,
            self.config.ejection_s,
        )
        try:
            await view.start(self.discovery, host_name())
        except DiscoveryError:
            if self.unusable:
                raise RuntimeClosed("client") from None
            raise
        self._views[name] = view
        return view

    @property
    def looks_elsewhere(self) -> bool:
        """Whether there may be instances in folders that this runtime does not look at."""
        return self._elsewhere is not None

    def elsewhere(self, name: EndpointName | None) -> str:
        """Words on such folders with live instances of an endpoint, None for any; see `Elsewhere.words`."""
        return "" if self._elsewhere is None else self._elsewhere.words(name)

    # life

    def check(self, operation: str) -> None:
        """Raise where the runtime cannot be used.

        Raises:
            ForkError: this process was forked from the one that made it.
            RuntimeClosed: it was shut down.
            WrongLoop: another thread or event loop than its own uses it.
        """
        if self._forked:
            raise ForkError()
        self.check_loop(operation)
        if self.unusable or (self._closing is not None and operation in NOT_WHILE_CLOSING):
            raise RuntimeClosed(operation)

    def check_loop(self, operation: str) -> None:
        """Raise where the runtime is used outside of its event loop.

        Raises:
            WrongLoop: another thread uses it, or another event loop runs in this thread.
        """
        running = _running_loop()
        if running is not self._loop and (running is not None or get_ident() != self._thread.ident):
            raise WrongLoop(operation, self._thread.name, get_ident() == self._thread.ident)

    @property
    def closing(self) -> bool:
        """Whether it is being shut down, or was."""
        return self._closing is not None

    def forked(self) -> None:
        """This process is a child of the one that made the runtime."""
        self._forked = self.unusable = True

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run `work` in a task that the runtime keeps and ends with itself."""
        task = self._loop.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)
        return task

    def shutdown(self) -> None:
        """Begin to drain and return at once; `serve_endpoint` is done when that is over, at most `TRD_DRAIN_TIMEOUT_S`.

        The instances leave discovery, clients are sent away, waiting requests are refused so that they go elsewhere,
        and running handlers finish; then everything is closed. May be called in any thread.
        """
        if self._forked or self._closing is not None:
            return
        if get_ident() != self._thread.ident:
            self._loop.call_soon_threadsafe(self.shutdown)
        else:
            self._closing = self._loop.create_task(self._close(self.config.drain_timeout_s))

    async def close(self) -> None:
        """Close everything and wait for it; what is served is drained first.

        Raises:
            WrongLoop: another thread or event loop than its own uses it.
        """
        if not self._forked:
            self.check_loop("close")
        self.shutdown()
        if self._closing is not None:
            await asyncio.shield(self._closing)

    async def _close(self, drain_s: float) -> None:
        try:
            await self._drain(drain_s)
        finally:
            await self._release()
        if self._exit is not None:
            # In a callback of the loop, which ends it: a task would keep the error for somebody to retrieve.
            self._loop.call_soon(sys.exit, self._exit.code)

    async def _drain(self, drain_s: float) -> None:
        self._token.cancel()
        if self._starting:
            await asyncio.wait(self._starting)
        if self._relisting is not None:
            self._relisting.cancel()
        endpoints = self._server.endpoints
        try:
            async with self._listing:
                for endpoint in endpoints:
                    await self.discovery.withdraw(endpoint.instance)
        except Exception as error:  # a place that is gone must not keep requests from finishing
            logger.warning("withdrawing from %s: %s", self.discovery.where, error)
        await self._server.drain(drain_s)

    async def _release(self) -> None:
        self.unusable = True
        self._watchdog.stop()
        self._server.close()
        await self.prober.close()
        await self.pool.close()
        for view in self._views.values():
            view.close()
        await self.discovery.close()
        await self.events.close()
        for network in self._networks.values():
            await network.close()
        await self.nats.close()
        self._threads.close()
        self._signals.remove()
        if not self._stopped.done():
            self._stopped.set_result(None)
        if self._serving and self._exit is None:
            await asyncio.wait(self._serving)
        left = [each for each in self._tasks if not each.done()]
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=CUT_S)  # a caller's iterator of requests may swallow its cancellation

    async def __aenter__(self) -> DistributedRuntime:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        state = "closed" if self.unusable else "draining" if self._closing else "open"
        return f"<DistributedRuntime {self.instance_id} {state}, {len(self._server.endpoints)} endpoints served>"


class _Values:
    """The values of a dict as they are whenever they are looked at."""

    def __init__(self, views: dict[EndpointName, EndpointView]) -> None:
        self._views = views

    def __iter__(self) -> Any:
        return iter(list(self._views.values()))
