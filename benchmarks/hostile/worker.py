"""The worker under attack: `python -m benchmarks.hostile.worker`. Its settings are its environment's."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvloop

from benchmarks.hostile.raw import WORKER
from benchmarks.memory import open_descriptors, resident_bytes
from benchmarks.processes import answer_questions
from triton_distributed.runtime import DistributedRuntime

BULK = bytes(32 * 1024)


async def echo(request: Any) -> AsyncIterator[Any]:
    yield request


async def hold(request: Any) -> AsyncIterator[Any]:
    await asyncio.get_running_loop().create_future()
    yield None


async def endless(request: Any) -> AsyncIterator[int]:
    number = 0
    while True:
        yield number
        number += 1


async def bulk(request: Any) -> AsyncIterator[bytes]:
    while True:
        yield BULK[:15_000]


async def upload(requests: AsyncIterator[Any]) -> AsyncIterator[int]:
    """Reads what comes, without end, letting others have their turn."""
    async for _ in requests:
        await asyncio.sleep(0)
    yield 0


async def deaf(requests: AsyncIterator[Any]) -> AsyncIterator[int]:
    """Never reads what comes."""
    await asyncio.get_running_loop().create_future()
    yield 0


async def sip(requests: AsyncIterator[Any]) -> AsyncIterator[int]:
    """Takes one, and waits."""
    async for _ in requests:
        await asyncio.get_running_loop().create_future()
    yield 0


HANDLERS = (echo, hold, endless, bulk, upload, deaf, sip)


class Lines(logging.Handler):
    """Counts what is logged; the first lines go to stderr."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.lines = 0

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        self.lines += 1
        self.bytes += len(text)
        if self.lines <= 20 and os.environ.get("HOSTILE_LOG"):
            print(text[-1500:], file=sys.stderr)


async def main(core: str) -> None:
    if core:
        os.sched_setaffinity(0, {int(core)})
    lines = Lines()
    logging.getLogger().addHandler(lines)
    runtime = DistributedRuntime(asyncio.get_running_loop())
    serving = [
        asyncio.ensure_future(runtime.endpoint(f"{WORKER}.{each.__name__}").serve_endpoint(each)) for each in HANDLERS
    ]

    async def answer(question: str) -> Any:
        if question != "state":
            raise ValueError(f"unknown question {question!r}")
        gc.collect()
        return {
            "rss": resident_bytes(),
            "fds": open_descriptors(),
            "tasks": len(asyncio.all_tasks()),
            "log_lines": lines.lines,
            "log_bytes": lines.bytes,
        }

    assert not any(each.done() for each in serving)
    for handler in HANDLERS:  # listening, all of them
        await (await runtime.endpoint(f"{WORKER}.{handler.__name__}").client()).wait_for_instances()
    await answer_questions(answer)
    os._exit(0)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
