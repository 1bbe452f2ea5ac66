"""The processes of one run. They are started, asked, stopped, killed and replaced."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from harness.processes import Child, ChildFailed
from triton_distributed.testing import EtcdServer, NatsServer

DRAIN_S = 30.0  # A worker's time for its end: TRD_DRAIN_TIMEOUT_S.
TCP = {"TRD_LISTEN": "tcp://127.0.0.1:0"}
# The settings of what runs between clients and workers, by name. `etcd` is discovery, with sessions over TCP.
PLANES: dict[str, dict[str, str]] = {"unix": {}, "tcp": TCP, "etcd": TCP, "nats": {"TRD_REQUEST_PLANE": "nats"}}


@asynccontextmanager
async def plane(name: str) -> AsyncIterator[tuple[Path, dict[str, str]]]:
    """Start the server that a plane needs; yield an empty folder with a short path, and settings for all processes."""
    async with AsyncExitStack() as stack:
        root = "/tmp" if os.path.isdir("/tmp") else None  # The path of a Unix socket must be short.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trh", dir=root)))
        settings = {"TRD_DIR": str(folder), "TRD_EVENTS": "local", **PLANES[name]}
        if name == "nats":
            nats = await stack.enter_async_context(NatsServer(environ=os.environ))
            settings |= {"NATS_SERVER": nats.url, "TRD_EVENTS": "nats"}
        elif name == "etcd":
            etcd = await stack.enter_async_context(EtcdServer(environ=os.environ))
            settings["ETCD_ENDPOINTS"] = etcd.url
        yield folder, settings


class Process:
    """A place in a fleet: the command for it, and the process that runs there now.

    Attributes:
        options: the options of `harness.member`, for the next start.
        child: the present process; None between two processes.
    """

    def __init__(self, name: str, parts: tuple[str, ...], options: dict[str, str], environ: dict[str, str]) -> None:
        self.name, self.parts, self.options, self._environ = name, parts, options, environ
        self._present, self._asking = asyncio.Event(), asyncio.Lock()
        self.child: Child | None = None
        self.instance_id = 0

    async def start(self) -> None:
        """Start the process. It can be called when this returns."""
        options = [word for name, value in self.options.items() for word in (f"--{name}", value) if word]
        self.child = await Child.start("harness.member", self.name, *self.parts, *options, environ=self._environ)
        self.instance_id = await self.child.ask("id")
        self._present.set()

    async def ask(self, question: str, **arguments: Any) -> Any:
        """Return the process's answer, one question at a time. While there is no process, wait for the next one."""
        async with self._asking:
            await self._present.wait()
            assert self.child is not None
            return await self.child.ask(question, **arguments)

    def send(self, number: signal.Signals) -> float:
        """Send a signal; return its time on the monotonic clock that all processes share."""
        assert self.child is not None
        at = time.monotonic()
        self.child.process.send_signal(number)
        return at

    async def leave(self) -> Child:
        """Wait until no question is under way, and hold further questions back; return the process."""
        async with self._asking:
            assert self.child is not None
            child, self.child = self.child, None
            self._present.clear()
            return child


class Fleet:
    """Workers and clients of one run; `async with` ends them all.

    Args:
        environ: the settings of every process.

    Attributes:
        processes: the processes by name.
    """

    def __init__(self, environ: dict[str, str]) -> None:
        self._environ = environ
        self.processes: dict[str, Process] = {}

    async def __aenter__(self) -> Fleet:
        return self

    async def __aexit__(self, *exception: object) -> None:
        for each in reversed(self.processes.values()):  # Clients end first: they were started last.
            if each.child is not None:
                await each.child.stop()

    async def start(self, name: str, *parts: str, options: dict[str, str] | None = None, **environ: str) -> Process:
        """Start a process.

        Args:
            name: the name of the process.
            parts: the parts that it runs, see `harness.member`.
            options: the options of `harness.member`, for example the loop.
            environ: settings of this process alone.
        """
        process = Process(name, parts, options or {}, {**self._environ, **environ})
        self.processes[name] = process
        await process.start()
        return process

    async def ask(self, names: Iterable[str], question: str, **arguments: Any) -> dict[str, Any]:
        """Return the answers of these processes, by name."""
        asked = list(names)
        answers = await asyncio.gather(*(self.processes[name].ask(question, **arguments) for name in asked))
        return dict(zip(asked, answers, strict=True))

    def ids(self, names: Iterable[str]) -> list[int]:
        """Return the instance ids of these workers."""
        return [self.processes[name].instance_id for name in names]

    async def kill(self, name: str) -> float:
        """SIGKILL a process and wait for its end; return when it was killed."""
        process = self.processes[name]
        at = process.send(signal.SIGKILL)
        await (await process.leave()).stop()
        return at

    async def replace(self, name: str) -> None:
        """Start a process in the place of one that has ended. It is registered when this returns."""
        await self.processes[name].start()

    async def restart(self, name: str) -> tuple[float, float]:
        """SIGTERM a worker and start its successor at once.

        Returns:
            when the worker was asked to end, and the seconds that it took.

        Raises:
            ChildFailed: the worker has not ended within `DRAIN_S`, or its exit status is not 0.
        """
        process = self.processes[name]
        at = process.send(signal.SIGTERM)
        old = await process.leave()
        ended = asyncio.ensure_future(asyncio.wait_for(old.process.wait(), DRAIN_S))
        ended.add_done_callback(lambda _: took.append(time.monotonic() - at))
        took: list[float] = []
        try:
            await process.start()
            status = await ended
        except TimeoutError:
            raise ChildFailed(f"{name} had not ended {DRAIN_S:g} s after SIGTERM") from None
        finally:
            ended.cancel()
            await old.stop()
        if status != 0:
            raise ChildFailed(f"{name} exited with status {status} after SIGTERM")
        return at, took[0]

    async def pause(self, name: str, seconds: float) -> None:
        """Stop a process for a while."""
        process = self.processes[name]
        process.send(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            process.send(signal.SIGCONT)


WORKERS, CLIENTS = ("w0", "w1", "w2"), ("c0", "c1")


@asynccontextmanager
async def service(settings: dict[str, str], worker: str, client: str) -> AsyncIterator[Fleet]:
    """Start three workers and two clients that are connected to each other.

    Args:
        settings: the settings of every process.
        worker: the part of the workers.
        client: the part of the clients; the client's number is added as an argument.
    """
    async with Fleet(settings) as fleet:
        await asyncio.gather(*(fleet.start(name, worker) for name in WORKERS))
        await asyncio.gather(*(fleet.start(name, f"{client}:{number}") for number, name in enumerate(CLIENTS)))
        await fleet.ask(CLIENTS, "connect", ids=fleet.ids(WORKERS))
        yield fleet
