"""What a test has left: running handlers, open calls, tasks and threads, each with its name and place."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable
from concurrent.futures import thread as executors

from triton_distributed.runtime import DistributedRuntime
from triton_distributed.system.current_line import innermost_line, standing
from triton_distributed.testing.virtual_time import place

GRACE_S = 2.0
"""Seconds that handlers, calls and threads may take to end after the test. A test that leaves nothing never waits."""

POLL_S = 0.002
_ANYIO = "TestRunner._call_in_runner_task"
"""The coroutine with which anyio's plugin waits for a fixture, in a task of its own."""

TURNS = 20  # Turns of the loop that a cancelled task or a closed transport may need.
OURS = ("trd-", "triton-distributed-")  # How the names of this package's threads begin.


class LeftOver(AssertionError):
    """The program under test has left tasks or failed endpoints.

    Attributes:
        found: a description of each, one line each.
    """

    def __init__(self, found: list[str]) -> None:
        super().__init__("\n".join(["left over at the end:", *found]))
        self.found = found


async def settled(runtimes: Iterable[DistributedRuntime], grace_s: float) -> list[str]:
    """Wait until no handler runs and no call is open, at most `grace_s` seconds. Describe those that remain."""
    loop, runtimes = asyncio.get_running_loop(), list(runtimes)
    until = loop.time() + grace_s
    while (found := busy(runtimes)) and loop.time() < until:  # noqa: ASYNC110 - no event tells
        await asyncio.sleep(POLL_S)
    return found


def busy(runtimes: Iterable[DistributedRuntime]) -> list[str]:
    """Describe the running handlers and the open calls of some runtimes. A call's own handler is named only once."""
    found, handled = [], set()
    for endpoint in (each for runtime in runtimes for each in runtime.worker.server.endpoints):
        for request in dict.fromkeys((*endpoint.gate.running, *endpoint.lingering.requests)):
            where = standing(request.task, request.items)
            name = endpoint.handler.name
            found.append(f"handler {name} of {endpoint.name}, request {request.context.id()}, still runs at {where}")
            handled.add(endpoint.name.path)
    calls = [each for runtime in runtimes for each in runtime.statistics().calls]
    open_calls = (each for each in calls if each.open and each.name not in handled)
    return [*found, *(f"{each.open} call(s) or stream(s) of {each.name} are still open" for each in open_calls)]


async def tasks_since(before: set[asyncio.Task[object]]) -> list[str]:
    """Describe the tasks of the running loop that did not exist before and do not end by themselves."""
    known = {*before, asyncio.current_task()}
    known |= {each for each in asyncio.all_tasks() if getattr(each.get_coro(), "__qualname__", "") == _ANYIO}
    for _ in range(TURNS):
        if asyncio.all_tasks() <= known:
            return []
        await asyncio.sleep(0)
    return sorted(f"task {each.get_name()} waits at {place(each)}" for each in asyncio.all_tasks() - known)


def threads_since(before: Iterable[threading.Thread]) -> list[str]:
    """Describe the threads that did not exist before and do not end.

    Idle threads of executors, which end with their loop, do not count; nor do daemon threads of other packages.
    """
    known, until = {*before, threading.current_thread()}, time.monotonic() + GRACE_S
    found = []
    for thread in threading.enumerate():
        pooled = thread in executors._threads_queues or thread.name == "AnyIO worker thread"
        if thread in known or pooled or (thread.daemon and not thread.name.startswith(OURS)):
            continue
        thread.join(max(0.0, until - time.monotonic()))
        if thread.is_alive():
            found.append(f"thread {thread.name} is at {innermost_line(thread)}")
    return found
