"""The processes of a soak, and what is done to them: restarts, cut connections, a process that is stopped."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import BenchmarkError, Child
from benchmarks.soak.waiting import PATIENCE_S, patiently
from benchmarks.soak.worker import STEADY
from triton_distributed.testing import EtcdServer, FaultProxy, NatsServer
from triton_distributed.testing.servers import free_port

PROXIED, RESTARTED = "proxied", "restarted"
WORKERS = {STEADY: "uvloop", PROXIED: "asyncio", RESTARTED: "asyncio"}  # with the loop that each begins with
CLIENTS = {"client-asyncio": "asyncio", "client-uvloop": "uvloop"}
STOPPED_S = 1.0
# By default glibc moves the size from which it asks the kernel for memory of its own up to the largest block that was
# ever given back. Arrays of up to 1 MiB then lie in its heap, whose holes make resident memory wander by 5 MiB while
# what is allocated stays the same to 0.1 MiB: what is kept could not be told from that.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10), "MALLOC_TRIM_THRESHOLD_": str(128 << 10)}
THREADS = "2"  # of a worker's handlers, all of which `touch` starts


@dataclass
class Options:
    """What a soak is made of.

    Attributes:
        seconds: how long the load goes.
        rate: calls a second of each client.
        plane: `direct` or `nats`.
        discovery: `file` or `etcd`.
        settle_s: what it may take at a quiet moment until there is no more of anything than before.
        worker: the module of the workers, for tests of the soak itself.
    """

    seconds: float = 600.0
    rate: float = 60.0
    seed: int = 1
    plane: str = "direct"
    discovery: str = "file"
    trace: bool = False
    settle_s: float = PATIENCE_S
    worker: str = "benchmarks.soak.worker"


class Process:
    """A worker or a client; whoever asks waits until it is there."""

    def __init__(self, name: str, loop: str) -> None:
        self.name, self.loop = name, loop
        self.lock = asyncio.Lock()
        self.child: Child | None = None
        self.instance_id = 0

    async def ask(self, question: str, **arguments: Any) -> Any:
        """Its answer, one question at a time."""
        async with self.lock:
            assert self.child is not None
            return await self.child.ask(question, **arguments)


@dataclass
class Stage:
    """Everything that runs.

    Attributes:
        behind: where the worker behind the proxy listens.
        broken: ids of instances whose streams may break: killed ones, and the one whose connections are cut.
        done: how often each fault was made.
        drains_s: how long each worker took that was asked to end.
        said: what processes logged that are gone by now.
    """

    options: Options
    environ: dict[str, str]
    directory: Path
    workers: dict[str, Process] = field(default_factory=dict)
    clients: dict[str, Process] = field(default_factory=dict)
    proxy: FaultProxy | None = None
    behind: str = ""
    broken: set[int] = field(default_factory=set)
    done: Counter[str] = field(default_factory=Counter)
    drains_s: list[float] = field(default_factory=list)
    said: list[dict[str, Any]] = field(default_factory=list)

    @property
    def processes(self) -> list[Process]:
        """Workers and clients."""
        return [*self.workers.values(), *self.clients.values()]

    @property
    def instances(self) -> list[int]:
        """Ids of the workers that are there."""
        return [each.instance_id for each in self.workers.values()]

    async def everybody(self, question: str, **arguments: Any) -> dict[str, Any]:
        """The answers of all, by name."""
        answers = await asyncio.gather(*(each.ask(question, **arguments) for each in self.processes))
        return {each.name: answer for each, answer in zip(self.processes, answers, strict=True)}

    async def start_worker(self, process: Process) -> None:
        """Start a worker's process; it can be called when this returns."""
        environ = {**self.environ, "TRD_THREADS": THREADS}
        if process.name == PROXIED and self.proxy is not None:
            environ |= {"TRD_LISTEN": self.behind, "TRD_ADVERTISE": self.proxy.address.removeprefix("tcp://")}
        elif self.options.discovery == "etcd" and self.options.plane == "direct":
            environ["TRD_LISTEN"] = "tcp://127.0.0.1:0"
        trace = "trace" if self.options.trace else "plain"
        process.child = await Child.start(self.options.worker, process.name, process.loop, trace, environ=environ)
        process.instance_id = await process.child.ask("id")
        if process.name == PROXIED:
            self.broken.add(process.instance_id)

    async def restart(self, kill: bool) -> None:
        """End the worker that is restarted, kill -9 or SIGTERM, and start it again on the other loop.

        Raises:
            BenchmarkError: asked to end, it did not drain and exit with status 0.
        """
        worker = self.workers[RESTARTED]
        async with worker.lock:
            child = worker.child
            assert child is not None
            if kill:
                self.broken.add(worker.instance_id)
            self.said.append(await child.ask("said"))
            begin = time.monotonic()
            child.process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
            try:
                status = await patiently(child.process.wait())
            except TimeoutError:
                raise BenchmarkError(f"a worker did not end within {PATIENCE_S:g} s") from None
            if not kill:
                self.drains_s.append(time.monotonic() - begin)
                if status != 0:
                    raise BenchmarkError(f"a worker that was asked to end exited with status {status}")
            worker.loop = "uvloop" if worker.loop == "asyncio" else "asyncio"
            await self.start_worker(worker)
            await child.stop()
            await worker.child.ask("go")
        self.done["killed" if kill else "ended"] += 1

    async def cut(self, reset: bool) -> None:
        """End every connection to the worker behind the proxy."""
        if self.proxy is not None:
            self.proxy.cut(reset=reset)
            self.done["reset" if reset else "cut"] += 1

    async def stop(self) -> None:
        """Stop the steady worker for a second."""
        child = self.workers[STEADY].child
        assert child is not None
        child.process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(STOPPED_S)
        finally:
            child.process.send_signal(signal.SIGCONT)
        self.done["stopped"] += 1


@asynccontextmanager
async def staged(options: Options) -> AsyncIterator[Stage]:
    """All processes of a soak, with the servers that they need; at rest."""
    async with AsyncExitStack() as stack:
        folder = "/tmp" if os.path.isdir("/tmp") else None  # the path of a Unix socket is short
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trs", dir=folder)))
        environ = {"TRD_DIR": str(directory), **MALLOC}
        if options.discovery == "etcd":
            etcd = await stack.enter_async_context(EtcdServer(environ=os.environ))
            environ |= {"ETCD_ENDPOINTS": etcd.url, "TRD_EVENTS": "local"}
        if options.plane == "nats":
            nats = await stack.enter_async_context(NatsServer(environ=os.environ))
            environ |= {"NATS_SERVER": nats.url, "TRD_REQUEST_PLANE": "nats", "TRD_EVENTS": "nats"}
        stage = Stage(options, environ, directory)
        if options.plane == "direct":
            stage.behind = f"tcp://127.0.0.1:{free_port()}"
            stage.proxy = await stack.enter_async_context(FaultProxy(stage.behind))
        trace = "trace" if options.trace else "plain"
        rate, seed = str(options.rate), str(options.seed)
        try:
            for name, loop in WORKERS.items():
                stage.workers[name] = worker = Process(name, loop)
                await stage.start_worker(worker)
            for name, loop in CLIENTS.items():
                client = stage.clients[name] = Process(name, loop)
                arguments = (name, loop, trace, rate, seed)
                client.child = await Child.start("benchmarks.soak.client", *arguments, environ=environ)
            yield stage
        finally:
            for each in (*stage.clients.values(), *stage.workers.values()):
                if each.child is not None:
                    await each.child.stop()


def faults(rng: random.Random) -> list[str]:
    """The order in which faults are made, over and over: a restart is every other one."""
    others = ["reset", "stop", "cut"]
    rng.shuffle(others)
    return [each for k, other in enumerate(others * 2) for each in ("end" if k % 2 else "kill", other)]


async def make(stage: Stage, fault: str) -> None:
    """Make one fault."""
    if fault in ("end", "kill"):
        await stage.restart(fault == "kill")
    elif fault == "stop":
        await stage.stop()
    else:
        await stage.cut(fault == "reset")
