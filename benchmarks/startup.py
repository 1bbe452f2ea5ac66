"""The cost of starting: hello world from process start to the first reply, and the import."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from benchmarks.peers import Kind
from benchmarks.rounds import Figures
from harness.leftovers import Leftovers
from harness.processes import ROOT, ChildFailed, environment_without_settings
from harness.usage import cpu_s, descendants, peak_mib

HELLO = {"ours": "benchmarks.hello", "grpc.aio": "benchmarks.hello_grpc"}  # Of other peers: benchmarks.greeting.
IMPORTS = {"ours": "import triton_distributed.runtime", "grpc.aio": "import grpc.aio"}
LEAVE = "import os; os._exit(0)"  # Ends a process without the interpreter's shutdown.
WAIT = "print(flush=True); input()"  # Keeps a process until it has been measured.
TIMEOUT_S = 60.0


class _Program:
    """A process of hello world."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, kind: Kind, role: str, directory: Path) -> _Program:
        environ = {**environment_without_settings(), **kind.environ(directory)}
        if kind.family in HELLO:
            arguments = [HELLO[kind.family], role, *([f"unix:{directory}/grpc"] if kind.family == "grpc.aio" else [])]
        else:
            arguments = ["benchmarks.greeting", role, kind.module, str(directory)]
        pipe, stderr = asyncio.subprocess.PIPE, kind.stderr(directory)
        with open(stderr, "ab") if stderr else nullcontext() as log:
            process = await asyncio.create_subprocess_exec(
                kind.python, "-m", *arguments, cwd=ROOT, env=environ, stdin=pipe, stdout=pipe, stderr=log
            )
        return cls(process)

    async def first_reply(self) -> float:
        """Return when the client had its first item (perf_counter)."""
        assert self.process.stdout is not None
        try:
            line = await asyncio.wait_for(self.process.stdout.readline(), TIMEOUT_S)
        except TimeoutError:
            raise ChildFailed(f"no first reply within {TIMEOUT_S:g} s") from None
        if not line:
            raise ChildFailed(f"the hello world client ended with status {await self.process.wait()}")
        return float(line)

    def pids(self) -> list[int]:
        return [self.process.pid, *descendants(self.process.pid)]

    async def end(self) -> None:
        below = Leftovers(self.process.pid)
        below.look()
        if self.process.returncode is None:
            self.process.kill()
        below.kill()  # They may hold the pipes whose end `wait` waits for.
        await self.process.wait()


async def hello_world(kind: Kind, directory: Path) -> Figures:
    """Seconds to the client's first item: with both processes started at once, then with a server already running.

    The CPU and the memory are those of both processes, and of what they started, until the first item. `perf_counter`
    is the machine's monotonic clock, which all processes share.
    """
    started = time.perf_counter()
    server = await _Program.start(kind, "server", directory)
    client = await _Program.start(kind, "client", directory)
    try:
        both = await client.first_reply() - started
        pids = [*server.pids(), *client.pids()]
        cpu, peak = sum(map(cpu_s, pids)), peak_mib(pids)
        await client.end()
        started = time.perf_counter()
        client = await _Program.start(kind, "client", directory)
        alone = await client.first_reply() - started
    finally:
        await client.end()
        await server.end()
    figures = {"both_s": both, "client_s": alone, "cpu_ms": cpu * 1e3}
    return figures if peak is None else {**figures, "peak_mib": peak}


async def import_time(kind: Kind, directory: Path, times: int) -> Figures:
    """Milliseconds that the import adds to a fresh interpreter: medians of alternating runs, with cached bytecode.

    `import_ms` ends with the import. `through_exit_ms` includes the interpreter's work on the modules at its end.
    `cpu_ms` is the import's CPU, and `peak_mib` the peak of a process that only imports.
    """
    code = IMPORTS[kind.family]
    environ = {**environment_without_settings(), **kind.environ(directory)}

    async def run(code: str) -> float:
        started = time.perf_counter()
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=ROOT, env=environ)
        if await process.wait():
            raise ChildFailed(f"python -c '{code}' failed")
        return (time.perf_counter() - started) * 1e3

    async def costs(code: str) -> tuple[float, float | None]:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", f"{code}\n{WAIT}", cwd=ROOT, env=environ, stdin=pipe, stdout=pipe
        )
        assert process.stdout is not None
        if not await process.stdout.readline():
            raise ChildFailed(f"python -c '{code}' failed")
        found = cpu_s(process.pid), peak_mib([process.pid])
        process.kill()
        await process.wait()
        return found

    await run(code)
    taken: dict[str, list[float]] = {"pass": [], code: [], LEAVE: [], f"{code}\n{LEAVE}": []}
    for _ in range(times):
        for each, milliseconds in taken.items():
            milliseconds.append(await run(each))
    bare, full, bare_left, full_left = map(statistics.median, taken.values())
    cpu, peak = await costs(code)
    figures = {
        "import_ms": full_left - bare_left,
        "through_exit_ms": full - bare,
        "interpreter_ms": bare,
        "cpu_ms": (cpu - (await costs("pass"))[0]) * 1e3,
    }
    return figures if peak is None else {**figures, "peak_mib": peak}
