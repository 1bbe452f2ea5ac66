"""The cost of starting: hello world from process start to the first reply, and the import."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from pathlib import Path

from benchmarks.workloads import Figures
from harness.processes import ROOT, ChildFailed, environment_without_settings

IMPORT = "import triton_distributed.runtime"
LEAVE = "import os; os._exit(0)"  # Ends a process without the interpreter's shutdown.
TIMEOUT_S = 30.0


async def hello_world(directory: Path) -> Figures:
    """Seconds to the client's first item: with both processes started at once, then with a server already running.

    `perf_counter` is the machine's monotonic clock, which all processes share.
    """
    environ = {**environment_without_settings(), "TRD_DIR": str(directory)}

    async def start(role: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.hello", role, cwd=ROOT, env=environ, stdout=asyncio.subprocess.PIPE
        )

    async def client(started: float) -> float:
        process = await start("client")
        try:
            output, _ = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
        except TimeoutError:
            process.kill()
            raise ChildFailed(f"no first reply within {TIMEOUT_S:g} s") from None
        if process.returncode:
            raise ChildFailed(f"the hello world client ended with status {process.returncode}")
        return float(output) - started

    started = time.perf_counter()
    server = await start("server")
    try:
        both = await client(started)
        alone = await client(time.perf_counter())
    finally:
        if server.returncode is None:
            server.terminate()
        await server.wait()
    return {"both_s": both, "client_s": alone}


async def import_time(times: int) -> Figures:
    """Milliseconds that the import adds to a fresh interpreter: medians of alternating runs, with cached bytecode.

    `import_ms` ends with the import. `through_exit_ms` includes the interpreter's work on the modules at its end.
    """

    async def run(code: str) -> float:
        started = time.perf_counter()
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=ROOT)
        if await process.wait():
            raise ChildFailed(f"python -c '{code}' failed")
        return (time.perf_counter() - started) * 1e3

    await run(IMPORT)
    taken: dict[str, list[float]] = {"pass": [], IMPORT: [], LEAVE: [], f"{IMPORT}\n{LEAVE}": []}
    for _ in range(times):
        for code, each in taken.items():
            each.append(await run(code))
    bare, full, bare_left, full_left = map(statistics.median, taken.values())
    return {"import_ms": full_left - bare_left, "through_exit_ms": full - bare, "interpreter_ms": bare}
