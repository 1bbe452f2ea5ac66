"""A worker of the soak with a fault that is planted: a part of `harness.member`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

from harness.member import Member
from harness.requests import Journal, Work, handler
from harness.soak.members import work

KEPT: list[Any] = []


def lies(journal: Journal) -> Any:
    """Every hundredth item is another one."""
    honest = handler(journal)

    async def answer(request: Work, context: Any) -> AsyncIterator[Any]:
        async for item in honest(request, context):
            yield [*item[:2], b"?"] if item[1] % 100 == 1 else item

    return answer


def keeps(journal: Journal) -> Any:
    """Each request leaves a descriptor and a task."""
    honest = handler(journal)

    async def answer(request: Work, context: Any) -> AsyncIterator[Any]:
        KEPT.append(os.open(os.devnull, os.O_RDONLY))
        KEPT.append(asyncio.create_task(asyncio.Event().wait()))
        async for item in honest(request, context):
            yield item

    return answer


async def faulty(member: Member, plant: str) -> None:
    """The part of a worker, with the plant of this name."""
    await work(member, {"lies": lies, "keeps": keeps}[plant])
