"""The connection of a test without an event loop: it calls as `connect_sync` does, and serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, Unpack, overload
from weakref import WeakSet

from triton_distributed.api.contracts import Bidirectional, Stream, Unary
from triton_distributed.api.declarations import BidirectionalHandler, StreamHandler, UnaryHandler
from triton_distributed.api.options import ServeOptions
from triton_distributed.api.served import Served
from triton_distributed.api.sync import Shared, SyncConnection
from triton_distributed.api.sync_loop import SyncLoop
from triton_distributed.names import EndpointName, Instance
from triton_distributed.testing.network import LocalConnection, LocalNetwork

R = TypeVar("R")
A = TypeVar("A")


class SyncServed:
    """An endpoint that a `LocalSyncConnection` serves. It can be called.

    Attributes:
        instance: its record: id, addresses, metadata.
    """

    def __init__(self, loop: SyncLoop, served: Served) -> None:
        self._loop = loop
        self._served = served
        self.instance: Instance = served.instance

    @property
    def name(self) -> EndpointName:
        """The endpoint."""
        return self.instance.endpoint

    def pause(self) -> None:
        """Withdraw the instance and refuse new requests; running ones go on."""
        self._loop.run("pause", self._served.pause)

    def resume(self) -> None:
        """Register the instance again and admit requests."""
        self._loop.run("resume", self._served.resume)

    def stop(self) -> None:
        """Stop serving now: new requests are refused, and running handlers are cancelled."""
        self._loop.run("stop", self._served.stop)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._served!r}>"


class LocalSyncConnection(SyncConnection):
    """A connection of a plain test. Made by the fixture `trd_sync` and by `worker()`. Its handlers run in a thread.

    Args:
        loop: the loop of the test's connections, in its thread.
        connection: does the work, on that loop.
    """

    def __init__(self, loop: SyncLoop, connection: LocalConnection) -> None:
        super().__init__(connection.runtime.config)
        self._loop = loop
        self._connection = connection
        self._shared = Shared(loop, connection, WeakSet())

    @classmethod
    @contextmanager
    def first(cls, network: LocalNetwork, grace_s: Callable[[], float]) -> Iterator[LocalSyncConnection]:
        """The first connection of a network that has a folder. The end of the block finds what is left."""
        loop = SyncLoop()
        try:
            yield cls(loop, loop.run("trd_sync", network.first))
            loop.run("trd_sync", lambda: network.end(grace_s()))
        finally:
            loop.stop()

    @overload
    def serve(
        self, endpoint: Unary[Any, Any], handler: UnaryHandler[Any, Any], **options: Unpack[ServeOptions]
    ) -> SyncServed: ...
    @overload
    def serve(
        self, endpoint: Stream[R, A], handler: StreamHandler[R, A], **options: Unpack[ServeOptions]
    ) -> SyncServed: ...
    @overload
    def serve(
        self,
        endpoint: Bidirectional[Any, Any],
        handler: BidirectionalHandler[Any, Any],
        **options: Unpack[ServeOptions],
    ) -> SyncServed: ...
    @overload
    def serve(self, endpoint: str, handler: Callable[..., Any], **options: Unpack[ServeOptions]) -> SyncServed: ...
    @overload
    def serve(self, endpoint: Callable[..., Any], /) -> SyncServed: ...

    def serve(self, endpoint: Any, handler: Any = None, **options: Any) -> SyncServed:
        """Serve an endpoint. It can be called when this returns.

        Args:
            endpoint: a function that `@trd.serve` has declared; or a contract or a name, followed by the handler.
            handler: the handler: a function or a bound method.
            options: see `ServeOptions`.

        Raises:
            Exception: as `Connection.serve` raises it.
        """
        served = self._loop.run("serve", partial(self._connection.serve, endpoint, handler, **options))
        return SyncServed(self._loop, served)

    def worker(self, **settings: Any) -> LocalSyncConnection:
        """Make one more connection on the same network: another instance, which serves and may be killed alone.

        Args:
            settings: settings of this connection alone, as arguments of `Config`.

        Raises:
            ConfigError: a setting is invalid.
        """
        made = self._loop.run("worker", partial(self._connection.worker, **settings))
        return LocalSyncConnection(self._loop, made)

    def kill(self) -> None:
        """End as a killed process does: its streams break, and it sends nothing more. Handlers are cancelled."""
        self._loop.run("kill", self._connection.kill)

    def close(self) -> None:
        """Drain what is served, cancel open calls, and close the connection."""
        self._closed = True
        self._loop.run("close", self._connection.close)
