"""The network of one test: connections that find each other and nothing else, and that leave nothing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any, Self

from triton_distributed.api.connection import Connection, connect_by
from triton_distributed.api.contracts import Contract
from triton_distributed.api.declarations import Declaration
from triton_distributed.api.served import Served
from triton_distributed.api.sync import disconnect
from triton_distributed.api.targets import Target
from triton_distributed.config import Config
from triton_distributed.discovery.memory import MemoryDiscovery, MemoryHub
from triton_distributed.errors import WrongLoop
from triton_distributed.names import EndpointName
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.runtime.component import Endpoint
from triton_distributed.testing.fakes import Fake, FakeTarget
from triton_distributed.testing.leftovers import GRACE_S, LeftOver, settled, tasks_since, threads_since

_PACKAGE = str(Path(__file__).parent.parent)

KILLED = "the process was killed by its test"

# The settings that say where other processes are. A test must not reach those that the environment names.
_WHERE = ("discovery", "directory", "static", "listen", "advertise", "request_plane", "events", "token")
_PREFIXES = ("etcd_", "nats_", "tls_")
PLACES = tuple(each for each in dataclasses.fields(Config) if each.name in _WHERE or each.name.startswith(_PREFIXES))


class OtherLoop(WrongLoop):
    """A connection of a fixture was used on another event loop than that of its test. Field: `scope`."""

    def __init__(self, operation: str, thread: str, same_thread: bool, scope: str) -> None:
        super().__init__(operation, thread, same_thread)
        self.args = (operation, thread, same_thread, scope)
        self.scope = scope

    def __str__(self) -> str:
        if not self.same_thread:
            return (
                f'{self.operation}: the fixture `trd` belongs to the event loop of its test, in thread "{self.thread}",'
                " and was used in another thread: use the fixture `trd_sync` there"
            )
        return (
            f"{self.operation}: the fixture `trd` belongs to the event loop of its test, which has the scope "
            f'"{self.scope}", and was used on another event loop. Give the test and all fixtures that use `trd` the '
            f'same loop: asyncio_default_fixture_loop_scope = "{self.scope}" in the settings of pytest, or '
            f'@pytest_asyncio.fixture(loop_scope="{self.scope}") at the fixture'
        )


class _Runtime(DistributedRuntime):
    """A runtime of a test. `scope` is the scope of its loop; empty if the loop is not that of a fixture."""

    scope = ""

    def check_loop(self, operation: str) -> None:
        try:
            super().check_loop(operation)
        except WrongLoop as error:
            if self.scope:
                raise OtherLoop(error.operation, error.thread, error.same_thread, self.scope) from None
            raise

    async def cut(self) -> None:
        """Close without a drain."""
        if self._closing is None:
            self._closing = self._loop.create_task(self._close(0.0))
        await asyncio.shield(self._closing)

    async def kill(self) -> None:
        """Vanish, as a process does that is killed: nothing more is sent."""
        await self.discovery.close()
        for session in (*self.worker.server.sessions, *self.pool.sessions):
            session.abandon(KILLED)
        await self.cut()


class LocalConnection(Connection):
    """A connection of a test, with its own runtime. Made by the fixture `trd`, by `worker()`, and by `LocalNetwork`."""

    runtime: _Runtime

    def __init__(self, network: LocalNetwork, config: Config, place: str = "") -> None:
        super().__init__(_Runtime(config=config), True)
        self._network = network
        self._faking: Connection | None = None
        self.place = place  # The line that called `connect`.
        self.killed = False

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        return self

    async def worker(self, **settings: Any) -> LocalConnection:
        """Make one more connection on the same network: another instance, which serves and may be killed alone.

        Args:
            settings: settings of this connection alone, as arguments of `Config`.

        Raises:
            ConfigError: a setting is invalid.
        """
        self.runtime.check("worker")
        made = LocalConnection(self._network, dataclasses.replace(self.runtime.config, **settings))
        made.runtime.scope = self.runtime.scope
        self._network.add(made)
        return made

    async def kill(self) -> None:
        """End as a killed process does: its streams break, and it sends nothing more. Handlers are cancelled.

        Raises:
            WrongLoop: another thread or event loop runs this.
        """
        self.runtime.check_loop("kill")
        self.killed = True
        await self.runtime.kill()

    async def serve_declared(self, handler: Any, declared: Declaration) -> Served:
        """Serve a handler as a declaration says; see `serve`."""
        served = await super().serve_declared(handler, declared)
        self._network.served.add(served.name)
        return served

    def forget_targets(self) -> None:
        """Find the endpoints anew: one that was served may be faked now."""
        for known in (self._called, self._streamed):
            known.clear()
        for target in [*self._targets.values()]:
            target.close()
        self._targets.clear()

    def _target(self, name: EndpointName, contract: Contract[Any, Any] | None) -> Target:
        fake = self._network.fake
        if fake is None or (name in self._network.served and name not in fake):
            return super()._target(name, contract)
        endpoint = fake.expected(name)
        faking = self._faking
        if faking is None:
            config = self._network.settings(self.runtime.config, None)
            runtime = _Runtime(config=config, discovery=MemoryDiscovery(hub=MemoryHub()))
            faking = self._faking = Connection(runtime, True)
        faking.runtime.spawn(endpoint.serve(faking, self))
        return FakeTarget(Endpoint(faking.runtime, name).unopened_client(), contract, endpoint)

    @property
    def runtimes(self) -> list[_Runtime]:
        """Its runtimes, with that of the fakes."""
        faking = [] if self._faking is None else [self._faking.runtime]
        return [self.runtime, *faking]  # type: ignore[list-item]

    async def close(self) -> None:
        """Drain what is served, cancel open calls, and close everything."""
        await super().close()
        if self._faking is not None:
            await self._faking.close()

    async def cut(self) -> None:
        """Close without a drain."""
        for each in self.runtimes:
            await each.cut()


class LocalNetwork:
    """Connections that find each other and nothing else: `async with LocalNetwork() as trd`, for fixtures of any scope.

    Until its end every `connect` of this process connects to it, whatever its settings name.

    Args:
        directory: a private folder with a short path, for connections in several event loops and processes. By default
            the connections are in one event loop and need no folder.
        scope: the scope of the event loop, for error texts.

    Attributes:
        fake: the answers of its fakes; None if it has none.
        connections: all connections that were made.
        served: the endpoints that they serve, or have served.

    Raises, at the end of the block:
        LeftOver: a handler, a call, a connection, a task or a thread was left; or a fake got an unexpected call.
    """

    def __init__(self, directory: Path | None = None, scope: str = "function") -> None:
        self.directory, self.scope = directory, scope
        self.fake: Fake | None = None
        self.connections: list[LocalConnection] = []
        self.served: set[EndpointName] = set()
        self.left: list[str] = []
        self._exits = contextlib.ExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None  # The only loop, if there is a first connection.
        self._tasks: dict[asyncio.AbstractEventLoop, set[asyncio.Task[Any]]] = {}
        self._threads: list[threading.Thread] = []

    def settings(self, config: Config | None, directory: Path | None) -> Config:
        """The settings of a connection of this network.

        Args:
            config: the settings that the program gave, which name other places.
            directory: the folder; None for a network in memory.
        """
        places: dict[str, Any] = {each.name: getattr(Config(), each.name) for each in PLACES}
        places |= {"discovery": "memory"} if directory is None else {"discovery": "file", "directory": directory}
        config = config or Config.from_env(**places)
        return dataclasses.replace(config, **places, handle_signals=False, watchdog_s=0.0)

    def variables(self) -> dict[str, str]:
        """The environment variables that lead other processes and runtimes to this network."""
        found = {each.metadata["variable"]: "" for each in PLACES}
        if self.directory is None:
            return found | {"TRD_DISCOVERY": "memory"}
        return found | {"TRD_DISCOVERY": "file", "TRD_DIR": str(self.directory)}

    def begin(self) -> None:
        """Let every `connect` of this process connect to this network, until `finish`."""
        disconnect()
        self._threads = threading.enumerate()
        self._exits.enter_context(connect_by(self.connect))

    def connect(self, config: Config | None = None) -> LocalConnection:
        """Make a connection on the running loop; `connect` does.

        Raises:
            RuntimeError: the network is in the memory of another event loop.
        """
        if self._loop is not None and self.directory is None and asyncio.get_running_loop() is not self._loop:
            raise RuntimeError(
                "connect(): the network of the fixture `trd` is in the memory of its test's event loop, and another "
                "loop runs here, as under a TestClient: use the fixture `trd_sync`, or make HTTP requests on the same "
                "loop with httpx.ASGITransport"
            )
        made = LocalConnection(self, self.settings(config, self.directory), _caller())
        self.add(made)
        return made

    def add(self, made: LocalConnection) -> None:
        """Keep a connection until the end."""
        self.connections.append(made)
        if self.fake is not None:
            self.fake.listeners.append(made.forget_targets)

    def faked(self) -> Fake:
        """Its fakes. From now on a call of an endpoint that is neither faked nor served is an error."""
        if self.fake is None:
            self.fake = Fake()
            self.fake.listeners += [each.forget_targets for each in self.connections]
            self.fake.changed()
        return self.fake

    def first(self) -> LocalConnection:
        """Make the connection of a fixture. The tasks that its loop has now may stay."""
        made = self.connect()
        made.place, made.runtime.scope = "", self.scope
        loop = asyncio.get_running_loop()
        self._tasks[loop] = asyncio.all_tasks()
        if self._loop is None:
            self._loop = loop
        return made

    async def end(self, grace_s: float = GRACE_S) -> None:
        """Close the connections of the running loop, and find what is left there.

        Args:
            grace_s: seconds that handlers and calls may take to end.
        """
        loop = asyncio.get_running_loop()
        mine = [each for each in self.connections if each.runtime.event_loop() is loop]
        running = await settled([each for one in mine if not one.killed for each in one.runtimes], grace_s)
        self.left += running
        self.left += [f"the connection of {each.place} is not closed" for each in mine if _left_open(each)]
        await asyncio.gather(*(each.cut() if running else each.close() for each in mine))
        self.left += await tasks_since(self._tasks.pop(loop, set()))

    def finish(self) -> list[str]:
        """Close all other connections, and describe what is left. No event loop runs in this thread."""
        disconnect()
        for each in self.connections:
            if not each.runtime.unusable:
                self.left.append(f"the connection of {each.place} is not closed")
                try:
                    _close(each)
                except TimeoutError:
                    self.left.append(f"the event loop of the connection of {each.place} is stuck")
        self.left += threads_since(self._threads)
        if self.fake is not None:
            self.left += self.fake.problems
        self._exits.close()
        return list(dict.fromkeys(self.left))

    async def __aenter__(self) -> LocalConnection:
        self.begin()
        return await self.first().__aenter__()

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self.end()
        left = await asyncio.to_thread(self.finish)
        if left and kind is None:
            raise LeftOver(left)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self.connections)} connections>"


def _left_open(connection: LocalConnection) -> bool:
    return bool(connection.place) and not connection.runtime.closing


def _close(connection: LocalConnection) -> None:
    """Close a connection whose loop runs in another thread, or does not run now. A closed loop has taken it along.

    Raises:
        TimeoutError: the other thread's loop does nothing.
    """
    loop = connection.runtime.event_loop()
    if loop.is_running():
        asyncio.run_coroutine_threadsafe(connection.cut(), loop).result(GRACE_S)
    elif not loop.is_closed():
        loop.run_until_complete(connection.cut())


def _caller() -> str:
    """The line outside of this package that called `connect`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return "an unknown line" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
