"""DistributedRuntime: one process's part in the system, assembled from the backends of `runtime.backends`."""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import threading
from asyncio import _get_running_loop as _running_loop  # A C function, also under uvloop; public except in name.
from collections.abc import Coroutine
from threading import get_ident
from typing import Any
from weakref import proxy

from triton_distributed.calling.candidates import Candidates, dialable
from triton_distributed.calling.prober import Prober
from triton_distributed.config import Config
from triton_distributed.discovery import Discovery
from triton_distributed.errors import ForkError, RuntimeClosed, WrongLoop
from triton_distributed.names import INSPECT, MAX_INSTANCE_ID, EndpointName
from triton_distributed.observe import LoopStats, Stats
from triton_distributed.runtime import inspection, statistics
from triton_distributed.runtime.backends import (
    certificate_files,
    make_discovery,
    make_elsewhere,
    make_events,
    make_nats,
    make_networks,
    make_tls,
    open_status_port,
)
from triton_distributed.runtime.clients import Clients
from triton_distributed.runtime.component import Endpoint, Namespace
from triton_distributed.runtime.events import RuntimeEvents
from triton_distributed.runtime.observing import Observing
from triton_distributed.runtime.requests import RequestReport, requests_of
from triton_distributed.runtime.sessions import Sessions
from triton_distributed.runtime.statistics import DiscoveryStatistics, RuntimeStatistics
from triton_distributed.runtime.token import CancellationToken
from triton_distributed.runtime.worker import Worker
from triton_distributed.serving.endpoint import CUT_S
from triton_distributed.status.metrics import Metrics, Sources
from triton_distributed.status.port import StatusPort
from triton_distributed.system.fork import watch_forks
from triton_distributed.system.identity import host_name
from triton_distributed.transport.network import Networks
from triton_distributed.transport.pool import SessionPool

logger = logging.getLogger("triton_distributed.runtime")

NOT_WHILE_CLOSING = ("serve_endpoint", "resume")
"""Operations that are refused while the runtime closes, because they would register an instance."""


class DistributedRuntime:
    """One process's part in the distributed system: it serves endpoints, calls them, or both.

    Args:
        event_loop: the loop to run on; by default the running loop.
        config: settings; by default those of the environment.
        discovery: replaces the discovery that the settings name, e.g. in a test; it is closed with the runtime.
        networks: further networks by scheme, besides sockets and those that the settings name.

    Raises:
        ConfigError: a setting is invalid.
        RuntimeError: no loop is running.

    The runtime connects when a call first needs it; an error then names the problem and the address. `triton_worker`
    makes and closes a runtime; otherwise call `await runtime.close()`.

    Attributes:
        metrics: the metrics of the runtime, as a page for Prometheus.
        status_port: health, statistics and metrics over HTTP, and what the program adds; see `StatusPort`.
        observers: what observes the calls and requests of this runtime; see `Observers`.
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
        # A loop of virtual time has its own source of random numbers, to make runs repeatable: `testing.virtual_time`.
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
        self._held, self._shared, self._share = sessions.held, sessions.shared, sessions.share
        self._networks = {**make_networks(self._loop, config, self.nats), **(networks or {})}
        self._candidates: dict[EndpointName, Candidates] = {}
        self.prober = Prober(self._loop)
        self.pool = SessionPool(
            self._loop,
            sessions.dialled,
            config.connect_timeout_s,
            self.prober.lost,
            config.health_timeout_s,
            config.host_timeout_s,
            tls,
            self._networks,
        )
        self.prober.pool = self.pool
        self.observers = Observing(config)
        self.worker = Worker(
            self._loop,
            config,
            self.discovery,
            self.instance_id,
            sessions.accepted,
            tls,
            self._networks,
            self.check,
            self.shutdown,
            self.observers,
        )
        self.worker.reserve(INSPECT, inspection.answering(proxy(self), self._share), *inspection.LIMITS)
        self.clients = Clients()
        self.metrics = Metrics(self._sources(), self._thread.ident or 0)
        self._token = CancellationToken()
        # In the order of their start. Calls, clients and endpoints bound the number.
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._handed_over: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Task[None] | None = None
        self._forked = False
        self.unusable = False
        watch_forks(self)
        self.status_port = StatusPort()
        open_status_port(self, self.status_port, self._thread.ident or 0)
        self.worker.status_url = self.status_port.url

    # names

    def namespace(self, name: str) -> Namespace:
        """A namespace; no I/O.

        Raises:
            InvalidName: `name` is not a valid namespace name.
        """
        return Namespace(self, name)

    def endpoint(self, path: str) -> Endpoint:
        """The endpoint with the path `namespace.component.endpoint`, with or without `dyn://`; no I/O.

        Raises:
            InvalidName: the path does not have exactly three valid parts.
        """
        return Endpoint(self, EndpointName.parse(path))

    def event_loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the runtime."""
        return self._loop

    def primary_token(self) -> CancellationToken:
        """The token that `shutdown` cancels."""
        return self._token

    def child_token(self) -> CancellationToken:
        """A new token that is cancelled with the primary one, and may be cancelled alone."""
        return self._token.child_token()

    def stats(self) -> dict[str, Stats]:
        """The counters of each served endpoint, by path."""
        return {each.name.path: each.stats for each in self.worker.server.endpoints}

    @property
    def loop_stats(self) -> LoopStats:
        """Stalls and lag of the event loop, counted from the first served endpoint on, unless `TRD_WATCHDOG_S` is 0."""
        return self.worker.watchdog.stats

    def _sources(self) -> Sources:
        worker = self.worker
        return Sources(
            instance_id=self.instance_id,
            served=worker.totals,
            called=self.clients.totals,
            candidates=self._candidates,
            server=worker.server,
            pool=self.pool,
            share=self._share,
            held=self._held,
            shared=self._shared,
            threads=worker.threads,
            loop=worker.watchdog.stats,
            discovery=self.discovery,
            nats=self.nats,
            draining=lambda: worker.draining,
            certificates=certificate_files(self.config),
        )

    def statistics(self) -> RuntimeStatistics:
        """The present state of the runtime: requests, calls, sessions, events, threads, discovery and the loop.

        It takes a few microseconds for each session and open stream, and does no I/O. Call it in the runtime's thread.
        """
        worker, events, listed = self.worker, self.events, self.worker.server.endpoints
        return RuntimeStatistics(
            instance_id=self.instance_id,
            state=self._state,
            endpoints=tuple(map(statistics.of_endpoint, listed)),
            calls=statistics.of_calls(self._candidates, self.clients),
            sessions=statistics.of_sessions(self.pool.sessions, worker.server.sessions),
            dialling=self.pool.dialling,
            received_bytes=self._share.received,
            sent_bytes=self._share.sent,
            held_bytes=self._held.bytes,
            held_limit_bytes=self._held.most,
            shared_bytes=self._shared.bytes,
            shared_limit_bytes=self._shared.limit,
            subscriptions=tuple(map(statistics.of_subscription, events.inboxes)),
            queues=tuple(map(statistics.of_queue, events.pulls)),
            threads=statistics.of_threads(worker.threads),
            discovery=DiscoveryStatistics(
                backend=type(self.discovery).__name__,
                where=self.discovery.where,
                registered=tuple(each.name.path for each in listed if each.listed),
                watched=tuple(name.path for name, each in self._candidates.items() if each.is_open),
            ),
            loop=statistics.of_loop(worker.watchdog.stats),
            tasks=len(self._tasks),
            status_port=self.status_port.url or self.status_port.problem,
        )

    def requests(self, *, stacks: bool = False) -> tuple[RequestReport, ...]:
        """The requests that the runtime serves now, each with the place where it waits.

        It takes some ten microseconds for each request, and does no I/O. Call it in the runtime's thread.

        Args:
            stacks: also report the steps of the handlers' code.
        """
        return tuple(requests_of(self.worker.server.endpoints, stacks))

    @property
    def _state(self) -> str:
        return "closed" if self.unusable else "draining" if self._closing else "open"

    def warn_of_unawaited(self) -> None:
        """Log the served endpoints that the program has not awaited. Called when the program is about to end."""
        self.worker.warn_of_unawaited()

    # calling

    def candidates(self, name: EndpointName) -> Candidates:
        """The candidates of an endpoint, shared by all its clients in this runtime. `open` them before use.

        Raises:
            ForkError, RuntimeClosed, WrongLoop: the runtime cannot be used here, or no more.
        """
        self.check("client")
        candidates = self._candidates.get(name)
        if candidates is None:
            discovery, host = self.discovery, host_name()
            candidates = self._candidates[name] = Candidates(
                name,
                self._loop,
                self.rng,
                lambda apply: discovery.watch(name, lambda change: apply(dialable(change, host))),
                self.pool.ask,
                self.pool.get,
                self.config.ejection_s,
            )
            self.prober.add(candidates)
        return candidates

    @property
    def looks_elsewhere(self) -> bool:
        """Whether instances may exist in folders that this runtime does not watch."""
        return self._elsewhere is not None

    def elsewhere(self, name: EndpointName | None) -> str:
        """Text about such folders with live instances of an endpoint, None for any; see `Elsewhere.words`."""
        return "" if self._elsewhere is None else self._elsewhere.words(name)

    # life

    def check(self, operation: str) -> None:
        """Raise if the runtime cannot be used.

        Raises:
            ForkError: this process was forked from the one that made the runtime.
            RuntimeClosed: the runtime was closed, or is closing and the operation would register an instance.
            WrongLoop: the caller runs in another thread or event loop.
        """
        if self._forked:
            raise ForkError()
        self.check_loop(operation)
        if self.unusable or (self._closing is not None and operation in NOT_WHILE_CLOSING):
            raise RuntimeClosed(operation)

    def check_loop(self, operation: str) -> None:
        """Raise if the runtime is used outside its event loop.

        Raises:
            WrongLoop: the caller runs in another thread, or another event loop runs in this thread.
        """
        running = _running_loop()
        if running is not self._loop and (running is not None or get_ident() != self._thread.ident):
            raise WrongLoop(operation, self._thread.name, get_ident() == self._thread.ident)

    @property
    def closing(self) -> bool:
        """Whether the runtime is shutting down or closed."""
        return self._closing is not None

    def forked(self) -> None:
        """Mark the runtime as unusable in a forked child process."""
        self._forked = self.unusable = self.worker.closed = True

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run `work` in a task that the runtime keeps, and cancels when it closes."""
        task = self._loop.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)
        return task

    def shutdown(self) -> None:
        """Begin to drain and return at once. `serve_endpoint` ends after the drain, within `TRD_DRAIN_TIMEOUT_S`.

        The instances leave discovery, clients are asked to use other instances, waiting requests are refused so that
        their calls go to other instances, and running handlers finish; then everything is closed. May be called in any
        thread.
        """
        if self._forked or self._closing is not None:
            return
        if get_ident() != self._thread.ident:
            self._loop.call_soon_threadsafe(self.shutdown)
        else:
            self.worker.draining = True
            self._closing = self._loop.create_task(self._close(self.config.drain_timeout_s))

    async def close(self) -> None:
        """Drain the served endpoints, close everything, and wait for the end.

        Raises:
            WrongLoop: the caller runs in another thread or event loop.
        """
        if not self._forked:
            self.check_loop("close")
        self.shutdown()
        if self._closing is not None:
            await asyncio.shield(self._closing)

    async def _close(self, drain_s: float) -> None:
        try:
            self._token.cancel()
            end = self._loop.time() + drain_s
            await self.worker.drain(drain_s)
            await self._wait_for_handed_over(end - self._loop.time())
        finally:
            await self._release()
        if (error := self.worker.exit) is not None:
            # A callback ends the loop by raising this. A task would keep the error until its result is retrieved.
            self._loop.call_soon(sys.exit, error.code)

    def finish_first(self, task: asyncio.Task[None]) -> None:
        """Let the drain of this runtime also wait for a task: a request that was handed over to another worker."""
        self._handed_over.add(task)
        task.add_done_callback(self._handed_over.discard)

    async def _wait_for_handed_over(self, seconds: float) -> None:
        left = set(self._handed_over)
        if left and seconds > 0:
            _, left = await asyncio.wait(left, timeout=seconds)
        if left:
            logger.warning("%d request(s) of send() still run, and are cancelled now", len(left))

    async def _release(self) -> None:
        self.unusable = True
        await self.status_port.close()
        self.worker.close()
        await self.prober.close()
        await self.pool.close()
        for candidates in self._candidates.values():
            candidates.close()
        await self.discovery.close()
        await self.events.close()
        for network in self._networks.values():
            await network.close()
        await self.nats.close()
        await self.worker.end()
        self._shared.close()
        left = [each for each in self._tasks if not each.done()]
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=CUT_S)  # A caller's iterator of requests may suppress its cancellation.

    async def __aenter__(self) -> DistributedRuntime:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        served = len(self.worker.server.endpoints)
        return f"<DistributedRuntime {self.instance_id} {self._state}, {served} endpoints served>"
