"""The load generator wrk, where the machine has it."""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.llm.reader import AnswerFailed, Clocks

SCRIPT = """\
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = %s
done = function(summary, latency, requests)
  local e = summary.errors
  local bad = e.connect + e.read + e.write + e.status + e.timeout
  io.write(string.format('{"requests": %%d, "bad": %%d, "us": %%d, "p50_ms": %%g, "p99_ms": %%g}\\n',
    summary.requests, bad, summary.duration, latency:percentile(50) / 1000, latency:percentile(99) / 1000))
end
"""


def program() -> str | None:
    """Return the path of wrk; None if the machine does not have it."""
    return shutil.which("wrk")


async def load(
    folder: Path, port: int, path: str, body: str, connections: int, seconds: float, pids: Sequence[int]
) -> dict[str, Any]:
    """As `reader.load`, by wrk with one thread. It does not count events.

    Args:
        folder: for its script.
        port: of the server.
        path: of the requests.
        body: of each request.
        connections: how many requests run at once.
        seconds: how long.
        pids: the processes of the server.

    Raises:
        AnswerFailed: an answer was not 200, or wrk failed.
    """
    wrk = program()
    assert wrk is not None
    script = folder / "wrk.lua"
    script.write_text(SCRIPT % json.dumps(body))  # JSON's escapes of ASCII are Lua's too.
    command = (wrk, "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "20s", "-s", str(script))
    clocks, before, began = Clocks(pids), _children_s(), time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *command, f"http://127.0.0.1:{port}{path}", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        told, _ = await asyncio.wait_for(process.communicate(), seconds + 30)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    used, passed = clocks.read(), time.monotonic() - began
    last = told.decode(errors="replace").rstrip().rpartition("\n")[2]
    if not last.startswith("{"):
        raise AnswerFailed(f"wrk said: {told.decode(errors='replace')[-500:]}")
    found: dict[str, Any] = json.loads(last)
    if found["bad"]:
        raise AnswerFailed(f"{found['bad']} of {found['requests']} requests failed")
    return {**found, **used, "loaded_s": found["us"] / 1e6, "seconds": passed, "client_s": _children_s() - before}


def _children_s() -> float:
    """The processor time of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
