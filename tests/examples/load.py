"""Many streams at once against an example's workers, one of which is killed meanwhile."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import triton_distributed as trd
from tests.timing import PATIENCE_S

CALLS, AT_ONCE, KILL_AFTER = 200, 32, 40


async def streams_with_a_kill(
    endpoint: str, instances: dict[str, int], request: Any, answer: list[Any], kill: Callable[[], None]
) -> Counter[str]:
    """Call an endpoint `CALLS` times, `AT_ONCE` at once, and kill a worker after `KILL_AFTER` answers.

    Args:
        endpoint: the endpoint that answers with a stream.
        instances: how many instances of each endpoint to wait for.
        request: the request.
        answer: the items of a whole answer.
        kill: kills the worker.

    Returns:
        How many calls ended as `whole` and as `cut`. An answer that ends like a whole one and is not, fails the test.
    """
    ends: Counter[str] = Counter()
    places = asyncio.Semaphore(AT_ONCE)

    async def call(here: trd.Connection) -> None:
        async with places:
            items = []
            try:
                async for item in here.stream(endpoint, request, timeout=PATIENCE_S):
                    items.append(item)
            except trd.StreamIncomplete:
                assert items == answer[: len(items)]
                ends["cut"] += 1
            else:
                assert items == answer
                ends["whole"] += 1
            if sum(ends.values()) == KILL_AFTER:
                kill()

    async with trd.connect() as here, asyncio.timeout(PATIENCE_S):
        for name, count in instances.items():
            await here.wait_for_instances(name, count, timeout=PATIENCE_S)
        async with asyncio.TaskGroup() as calls:
            for _ in range(CALLS):
                calls.create_task(call(here))
    return ends
