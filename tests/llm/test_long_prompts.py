"""Long prompts: what the loop, other requests and the memory of a front end see of them."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

import triton_distributed as trd
from triton_distributed.llm.http.front import front_end
from triton_distributed.llm.models.prompts import TokenizerThreads


async def test_the_loop_of_a_front_end_is_watched():
    async with trd.connect(trd.Config(discovery="memory", handle_signals=False)) as here:
        await front_end(here)
        while not sum(here.runtime.loop_stats.lag):
            await asyncio.sleep(0)


@pytest.mark.parametrize(("processors", "expected"), [(1, 1), (2, 1), (3, 2), (64, 4)])
async def test_a_processor_stays_free_for_the_loop(monkeypatch, processors, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)), raising=False)
    threads = TokenizerThreads()
    gate, running = threading.Event(), threading.Semaphore(0)

    def wait() -> None:
        running.release()
        gate.wait()

    try:
        work = [asyncio.create_task(threads.run(wait)) for _ in range(expected + 1)]
        await asyncio.sleep(0)
        for _ in range(expected):
            assert await asyncio.to_thread(running.acquire, timeout=60)
        assert not running.acquire(blocking=False)
        gate.set()
        await asyncio.gather(*work)
    finally:
        gate.set()
        threads.close()
