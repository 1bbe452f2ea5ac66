"""Discovery through etcd, for any number of hosts.

All communication with etcd runs in one daemon thread with its own loop, so that a handler that blocks the program's
loop can neither lose the lease nor prevent its repair. `etcd.lease` keeps one lease for each discovery, with its
records; `etcd.watch` follows the watched endpoints. Both use one client that knows all endpoints of etcd. The thread
starts with the first registration or watch, and passes changes to the program's loop in order.

Several watches of one endpoint share one stream. Each endpoint has its own stream, so a process receives changes only
of the endpoints that it calls, however many others exist.

While etcd is away, the known instances stay in use. A registration waits for the timeout and then fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from triton_distributed.discovery import record
from triton_distributed.discovery.base import Sink, Watch
from triton_distributed.discovery.etcd.keys import EtcdKeys
from triton_distributed.discovery.etcd.lease import Registrar
from triton_distributed.discovery.etcd.shared_watch import SharedView
from triton_distributed.discovery.etcd.watch import EndpointWatch
from triton_distributed.discovery.watchers import Watcher
from triton_distributed.errors import DiscoveryError
from triton_distributed.external.etcd import EtcdClient
from triton_distributed.external.etcd_endpoint import EtcdError, EtcdOptions
from triton_distributed.names import EndpointName, Instance
from triton_distributed.system.loop_thread import LoopThread, ThreadEnded

_log = logging.getLogger("triton_distributed.discovery")

BACKEND = "etcd"

REVOKE_S = 2.0
"""Seconds for revoking the lease at the end. If etcd is frozen, the lease expires by itself."""

END_S = 1.0
"""Further seconds, beyond `REVOKE_S`, for the thread to end."""

ORPHAN_S = 5.0
"""Seconds between checks whether the program's loop was closed without notice, which ends the registrations."""

T = TypeVar("T")


class EtcdDiscovery:
    """Registers instances under a lease in etcd.

    Args:
        options: the addresses and credentials of etcd.
        prefix: the prefix of every key.
        lease_ttl_s: seconds after which etcd removes a process that ended without revoking its lease; also the seconds
            for which known instances are kept if an emptied etcd does not list them.
        timeout_s: seconds for a registration, or for the first watch of an endpoint.

    Raises:
        ConfigError: an endpoint of etcd is not a URL.
    """

    def __init__(
        self,
        options: EtcdOptions,
        *,
        prefix: str = "triton-distributed",
        lease_ttl_s: int = 10,
        timeout_s: float = 5.0,
    ) -> None:
        self._keys = EtcdKeys(prefix)
        self._client = EtcdClient(options, self._keys.lineage)
        self.where = self._client.where
        self._ttl_s, self._timeout_s = lease_ttl_s, timeout_s
        self._thread: LoopThread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._registrar = Registrar(self._client, self._keys, lease_ttl_s)
        self._views: dict[EndpointName | None, SharedView] = {}  # One for each watched endpoint.
        self._pid = os.getpid()
        self._closed = False

    def __repr__(self) -> str:
        how = "closed" if self._closed else "idle" if self._thread is None else "open"
        return f"<EtcdDiscovery {how} watched={len(self._views)} {self._client!r}>"

    @property
    def answers(self) -> bool:
        """Whether etcd could be reached when it was last asked."""
        return self._client.reachable

    @property
    def answered_at(self) -> float:
        """When etcd last answered, on `time.monotonic`; 0 before its first answer."""
        return self._client.answered_at

    # --- the protocol ------------------------------------------------------------------------------------------------

    async def register(self, instance: Instance) -> None:
        try:
            value = record.encode(instance, os.getpid())
        except record.BadRecord as error:
            raise DiscoveryError(BACKEND, self.where, f"cannot register {instance.endpoint}: {error}") from error
        key = self._keys.of(instance.endpoint, instance.id)
        try:
            await self._call(lambda: self._registrar.register(key, value))
        except asyncio.CancelledError:
            if self._thread is not None:  # The record may be written already, although the caller never learns of it.
                self._thread.post(self._registrar.undo, key, value)
            raise

    async def withdraw(self, instance: Instance) -> None:
        if self._thread is None or self._closed or self._pid != os.getpid():
            return
        key = self._keys.of(instance.endpoint, instance.id)
        await self._call(lambda: self._registrar.withdraw(key))

    def mark(self, instance: Instance, busy: bool) -> None:
        if self._thread is None or self._closed or self._pid != os.getpid():
            return
        self._thread.post(self._registrar.mark, self._keys.of(instance.endpoint, instance.id), busy)

    async def watch(self, endpoint: EndpointName | None, sink: Sink) -> Watch:
        thread = self._start()
        view = self._views.get(endpoint)
        if view is None:
            view = self._views[endpoint] = SharedView(asyncio.get_running_loop())
            source = EndpointWatch(self._client, self._keys, endpoint, self._ttl_s, view.publish)
            view.opening = asyncio.ensure_future(self._call(lambda: view.open(source)))
        view.users += 1

        def closed(_: Watcher | None = None) -> None:
            view.users -= 1
            if not view.users and self._views.get(endpoint) is view:
                del self._views[endpoint]
                thread.post(view.close)
                view.opening.cancel()

        try:
            await asyncio.shield(view.opening)
            self._check_open()
        except BaseException:
            closed()
            raise
        return view.watchers.add(endpoint, sink, view.instances.values(), closed)

    async def close(self) -> None:
        if self._pid != os.getpid():
            return
        self._closed = True
        for view in tuple(self._views.values()):
            view.watchers.close()
        if self._thread is not None:
            await self._thread.stop(REVOKE_S + END_S)

    # --- this loop and the thread's ----------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed or self._pid != os.getpid():
            raise DiscoveryError(BACKEND, self.where, "it was closed, or belongs to a process that forked this one")

    def _start(self) -> LoopThread:
        self._check_open()
        self._loop = asyncio.get_running_loop()
        if self._thread is None:
            self._thread = LoopThread(self._main, "triton-etcd")
        return self._thread

    async def _main(self, stopping: asyncio.Event) -> None:
        loop = self._loop
        background = [asyncio.create_task(each) for each in (self._registrar.run(), self._client.watch_over())]
        while not stopping.is_set() and not (loop and loop.is_closed()):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ORPHAN_S):
                    await stopping.wait()
        # No other task may use the connection that the revocation needs, or write a record after it.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.wait([*background, *others])
        try:
            async with asyncio.timeout(REVOKE_S):
                await self._registrar.revoke()
        except (EtcdError, TimeoutError) as error:
            _log.info("etcd at %s: the lease was not revoked and will expire by itself: %s", self.where, error)
        self._client.close()

    async def _call(self, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine function in the thread; its failures become DiscoveryError."""
        try:
            return await self._start().call(lambda: self._bounded(function))
        except EtcdError as error:
            raise DiscoveryError(BACKEND, self.where, str(error)) from error
        except TimeoutError:
            reason = f"no answer for {self._timeout_s:g} s ({self._client.troubles()})"
            raise DiscoveryError(BACKEND, self.where, reason) from None
        except ThreadEnded:
            raise DiscoveryError(BACKEND, self.where, "it was closed meanwhile") from None

    async def _bounded(self, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async with asyncio.timeout(self._timeout_s):
            return await function()
