"""A second attempt, on another instance, for a call that takes long. The first answer counts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from triton_distributed.calling.call import Call
from triton_distributed.names import Instance
from triton_distributed.routing.load import LoadBook
from triton_distributed.routing.policies import Policy


class AnotherInstance:
    """A policy that avoids the instance of an earlier call if there are others."""

    def __init__(self, policy: Policy, call: Call) -> None:
        self._policy = policy
        self._call = call

    def __call__(self, request: Any, instances: tuple[Instance, ...], load: LoadBook) -> Instance:
        used = self._call.waits_for()
        rest = tuple(each for each in instances if used is None or each.id != used.instance_id)
        return self._policy(request, rest or instances, load)


async def first_answer(
    first: Call, after_s: float, second: Callable[[], Call | None], answer: Callable[[Call], Awaitable[Any]]
) -> Any:
    """Return the first answer and cancel the other call. If both fail, raise the error of the first call.

    Args:
        first: the call that is under way.
        after_s: seconds before the second begins.
        second: begins the second call; returns None if there is no other instance or no budget for it.
        answer: waits for a call's single value.
    """
    one: asyncio.Future[Any] = asyncio.ensure_future(answer(first))
    tasks = [one]
    try:
        done, _ = await asyncio.wait(tasks, timeout=after_s)
        if not done and (other := second()) is not None:
            tasks.append(asyncio.ensure_future(answer(other)))
            done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if rest and all(each.exception() is not None for each in done):
                await asyncio.wait(rest)
            for each in tasks:
                if each.done() and each.exception() is None:
                    return each.result()
        return await one
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
