"""A worker of the soak with a fault that is planted: FAULT names it."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

from benchmarks.soak import worker
from benchmarks.soak.waiting import LOOPS

KEPT: list[Any] = []
honest = worker.handlers


def faulty(*arguments: Any) -> Any:
    alive, served = honest(*arguments)
    numbers, limits = served["numbers"]

    async def lies(request: dict[str, Any]) -> AsyncIterator[Any]:
        async for item in numbers(request):
            yield {**item, "t": "?"} if item["i"] % 100 == 0 else item

    async def keeps(request: dict[str, Any]) -> AsyncIterator[Any]:
        KEPT.append(os.open(os.devnull, os.O_RDONLY))
        KEPT.append(asyncio.create_task(asyncio.Event().wait()))
        async for item in numbers(request):
            yield item

    plants = {each.__name__: each for each in (lies, keeps)}
    return alive, {**served, "numbers": (plants[os.environ["FAULT"]], limits)}


if __name__ == "__main__":
    worker.handlers = faulty
    LOOPS[sys.argv[2]](worker.main(sys.argv[1], False))
