"""`connect_sync`: calls without an event loop, for Flask, Django, Celery, scripts and notebooks."""

from __future__ import annotations

import asyncio
import atexit
from collections.abc import AsyncIterable, Iterable, Iterator
from contextvars import Context as Variables
from contextvars import copy_context
from functools import partial
from threading import Lock, get_ident
from typing import Any, NamedTuple, TypeVar, Unpack, overload
from weakref import WeakSet

from triton_distributed.api.connection import Connection, connect
from triton_distributed.api.contracts import Bidirectional, Contract, Stream, Unary
from triton_distributed.api.options import StreamOptions, UnaryOptions
from triton_distributed.api.sync_context import Relay
from triton_distributed.api.sync_items import SyncItemStream
from triton_distributed.api.sync_loop import SyncLoop, check_thread
from triton_distributed.api.sync_requests import requests_of
from triton_distributed.config import Config
from triton_distributed.context import Context, current
from triton_distributed.errors import RuntimeClosed
from triton_distributed.runtime.instances import InstanceStatus
from triton_distributed.status.metrics import Metrics
from triton_distributed.system.fork import watch_forks

R = TypeVar("R")
A = TypeVar("A")

EXIT_S = 1.0
"""Seconds that the end of the process waits until open connections are closed. Closing takes some milliseconds."""


def connect_sync(config: Config | None = None) -> SyncConnection:
    """Connect this process to the others, for code without an event loop: `with trd.connect_sync() as here`.

    Nothing happens before the first call: no I/O, no thread. The connection may be made once, where a program begins,
    and used in all threads and in forked children. All connections with equal settings share what they need.

    Args:
        config: the settings; by default those of the environment.

    Raises:
        ConfigError: a setting is invalid.
    """
    return SyncConnection(config or Config.from_env())


class SyncConnection:
    """Calls endpoints from any thread, and waits for the answers. Made by `connect_sync`.

    The calls run on one event loop in a daemon thread of this process. In a forked child the first call makes a new
    one. An interrupt of a waiting thread (Ctrl-C) cancels the handler. A call in a plain handler inherits the deadline,
    id and cancellation of the handler's request. Where an event loop runs, use `connect`.

    Raises, from each call:
        RuntimeError: an event loop runs in this thread. Only in a notebook a cell may wait nevertheless.
        RuntimeClosed: the connection was closed.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._shared: Shared | None = None
        self._closed = False

    @overload
    def call(self, endpoint: Unary[R, A], request: R, **options: Unpack[UnaryOptions]) -> A: ...
    @overload
    def call(self, endpoint: str, request: Any, **options: Unpack[UnaryOptions]) -> Any: ...

    def call(self, endpoint: Any, request: Any, **options: Any) -> Any:
        """Call an endpoint that answers with one value, and return the value.

        Args:
            endpoint: a `Unary` contract, or the endpoint's name.
            request: the request. Large arrays and buffers are not copied: they must not change until this returns.
            options: see `UnaryOptions`.

        Raises:
            TritonError: as `Connection.call` raises it.
        """
        return self._wait("call", endpoint, request, options)

    def _wait(self, operation: str, endpoint: Any, request: Any, options: Any) -> Any:
        shared = self._open(operation)
        relay, variables = _inherited(shared, options)
        try:
            work = partial(getattr(shared.connection, operation), endpoint, request, **options)
            return shared.loop.run(operation, work, variables)
        finally:
            if relay is not None:
                relay.detach()

    @overload
    def stream(self, endpoint: Stream[R, A], request: R, **options: Unpack[StreamOptions]) -> SyncItemStream[A]: ...
    @overload
    def stream(
        self, endpoint: Bidirectional[R, A], request: Iterable[R], **options: Unpack[StreamOptions]
    ) -> SyncItemStream[A]: ...
    @overload
    def stream(self, endpoint: str, request: Any, **options: Unpack[StreamOptions]) -> SyncItemStream[Any]: ...

    def stream(self, endpoint: Any, request: Any, **options: Any) -> SyncItemStream[Any]:
        """Call an endpoint that answers with a stream. The call begins now and waits for a first instance in its time.

        Args:
            endpoint: a `Stream` or `Bidirectional` contract, or the endpoint's name.
            request: the request; for a bidirectional endpoint, an iterable of items. An iterable other than a list or a
                tuple is read in a thread of its own, one item for each that is sent.
            options: see `StreamOptions`.

        Returns:
            The items; see `SyncItemStream` for what they raise.

        Raises:
            TritonError: as `Connection.stream` raises it.
        """
        shared = self._open("stream")
        if isinstance(request, AsyncIterable) or (
            isinstance(endpoint, Bidirectional) and not isinstance(request, Iterable)
        ):
            raise TypeError(f"stream(): {request!r} is not a plain iterable of requests; connect() takes async ones")
        if isinstance(endpoint, Bidirectional) or isinstance(request, Iterator):
            request = requests_of(request, copy_context())
        relay, variables = _inherited(shared, options)
        try:
            work = partial(shared.connection.stream, endpoint, request, **options)
            return SyncItemStream(shared.loop, shared.loop.run("stream", work, variables), relay)
        except BaseException:
            if relay is not None:
                relay.detach()
            raise

    @overload
    def send(self, endpoint: Unary[R, Any] | Stream[R, Any], request: R, **options: Unpack[StreamOptions]) -> None: ...
    @overload
    def send(self, endpoint: str, request: Any, **options: Unpack[StreamOptions]) -> None: ...

    def send(self, endpoint: Any, request: Any, **options: Any) -> None:
        """Hand a request over. The handler runs to its end, and its items are dropped.

        It returns when a handler has begun with the request; see `Connection.send`. `close` waits for requests that
        still run; the end of a process without `close` does not.

        Args:
            endpoint: the endpoint's contract, which is not bidirectional, or its name.
            request: the request.
            options: see `StreamOptions`. A `timeout` also ends the handler.

        Raises:
            TritonError: as `Connection.send` raises it.
        """
        self._wait("send", endpoint, request, options)

    def instances(self, endpoint: Contract[Any, Any] | str) -> list[InstanceStatus]:
        """The present instances of an endpoint, each with its state, its metadata and its load; see `InstanceStatus`.

        Args:
            endpoint: its contract or its name.

        Raises:
            DiscoveryError: discovery cannot be read.
        """
        shared = self._open("instances")
        found: list[InstanceStatus] = shared.loop.run("instances", partial(shared.connection.instances, endpoint))
        return found

    def wait_for_instances(
        self, endpoint: Contract[Any, Any] | str, count: int = 1, *, timeout: float | None = None
    ) -> None:
        """Wait until at least `count` instances of an endpoint exist.

        Args:
            endpoint: its contract or its name.
            count: how many instances.
            timeout: seconds; None for no limit.

        Raises:
            TritonError: as `Connection.wait_for_instances` raises it.
        """
        shared = self._open("wait_for_instances")
        work = partial(shared.connection.wait_for_instances, endpoint, count, timeout=timeout)
        shared.loop.run("wait_for_instances", work)

    @property
    def metrics(self) -> Metrics:
        """The metrics of all synchronous connections with these settings in this process, as a page for Prometheus.

        Raises:
            RuntimeClosed: the connection was closed.
        """
        return self._open("metrics").connection.metrics

    def _open(self, operation: str) -> Shared:
        shared = self._shared
        if shared is None or shared.loop.inherited:
            if self._closed:
                raise RuntimeClosed(operation)
            shared = self._shared = _process.join(self, operation)
        return shared

    def __enter__(self) -> SyncConnection:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. The last one with these settings in this process cancels open calls and waits."""
        self._closed = True
        shared, self._shared = self._shared, None
        if shared is not None and not shared.loop.inherited:
            _process.leave(self, shared)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "not used yet" if self._shared is None else "open"
        return f"<SyncConnection {state}>"


def _inherited(shared: Shared, options: dict[str, Any]) -> tuple[Relay | None, Variables]:
    """The variables of a call, and the relay between its context and that of its caller, if there is one."""
    variables = copy_context()
    serving = current.get()
    if (context := options.get("context")) is not None:
        if not isinstance(context, Context):
            return None, variables  # The call refuses it.
        relay = Relay(context, shared.loop.post)
        options["context"] = relay.context
        return relay, variables
    if serving is None or serving.over:
        return None, variables
    relay = Relay(serving, shared.loop.post)
    variables.run(current.set, relay.context)
    return relay, variables


class Shared(NamedTuple):
    """What the synchronous connections with equal settings share."""

    loop: SyncLoop
    connection: Connection
    users: WeakSet[SyncConnection]


class _Process:
    """The loop and the connections of this process."""

    def __init__(self) -> None:
        self._exits = False
        self._reset()
        watch_forks(self)

    def _reset(self) -> None:
        self._lock = Lock()  # Guards the attributes below.
        self._loop: SyncLoop | None = None
        self._shared: dict[Config, Shared] = {}
        self._closing = 0

    def forked(self) -> None:
        """Begin anew in a forked child."""
        self._reset()

    def join(self, user: SyncConnection, operation: str) -> Shared:
        """What the connections with the settings of `user` share, made if it is the first."""
        check_thread(operation)
        with self._lock:
            loop = self._loop
            if loop is None:
                loop = self._loop = SyncLoop()
                if not self._exits:
                    self._exits = True
                    atexit.register(self.exit)
            if user.config not in self._shared:
                loop.run(operation, partial(self._connect, loop, user.config))
            shared = self._shared[user.config]
            shared.users.add(user)
            return shared

    def _connect(self, loop: SyncLoop, config: Config) -> None:
        """Runs on the loop. An interrupt of the thread that waits for it loses nothing."""
        self._shared[config] = Shared(loop, connect(config), WeakSet())

    def leave(self, user: SyncConnection, shared: Shared) -> None:
        """Close what no connection uses any more."""
        if get_ident() == shared.loop.thread:
            raise RuntimeError("close(): the thread of the calls cannot wait for its own end: close in another thread")
        with self._lock:
            shared.users.discard(user)
            if len(shared.users) or self._shared.get(user.config) is not shared:
                return
            del self._shared[user.config]
            self._closing += 1
        try:
            shared.loop.run_blocking("close", shared.connection.close)
        finally:
            with self._lock:
                self._closing -= 1
                last = not self._shared and not self._closing
                if last:
                    self._loop = None
            if last:
                shared.loop.stop()

    def disconnect(self) -> None:
        """See the function of this name."""
        with self._lock:
            loop, self._loop = self._loop, None
            opened = [*self._shared.values()]
            self._shared.clear()
            for each in opened:
                for user in tuple(each.users):
                    user._shared = None
        if loop is not None:
            loop.run_blocking("disconnect", partial(_close_all, opened))
            loop.stop()

    def exit(self) -> None:
        """Close everything at the end of the process, in a bounded time."""
        if not self._lock.acquire(timeout=EXIT_S):  # A daemon thread has it and does not run any more.
            return
        try:
            loop, self._loop = self._loop, None
            opened = [*self._shared.values()]
            self._shared.clear()
        finally:
            self._lock.release()
        if loop is not None:
            loop.run_blocking("exit", partial(_close_all, opened), None, EXIT_S)
            loop.stop(EXIT_S)


def disconnect() -> None:
    """Close what all synchronous connections of this process share, and end their thread, e.g. after a test.

    Open calls are cancelled. A connection that is used again connects anew.
    """
    _process.disconnect()


async def _close_all(opened: Iterable[Shared]) -> None:
    await asyncio.gather(*(each.connection.close() for each in opened), return_exceptions=True)


_process = _Process()
