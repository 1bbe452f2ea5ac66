"""Makes the calls of a chaos run through an ordinary client and tells the oracle what came of each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from triton_distributed.runtime import Client
from triton_distributed.testing.chaos.oracle import Oracle, Ticket
from triton_distributed.testing.chaos.requests import Plan


async def make_calls(client: Client, plans: Iterable[Plan], oracle: Oracle, clock: Callable[[], float]) -> None:
    """Make each call at its time, whatever became of those before; returns when all have ended.

    Args:
        client: of the endpoint that `requests.handler` serves.
        plans: the calls, in the order of their time.
        oracle: is told of each.
        clock: seconds; also what `Plan.at_s` is counted on, from now.
    """
    started = clock()
    async with asyncio.TaskGroup() as calls:
        for plan in plans:
            wait = started + plan.at_s - clock()
            if wait > 0:
                await asyncio.sleep(wait)
            calls.create_task(_call(client, plan, oracle, clock))


async def _call(client: Client, plan: Plan, oracle: Oracle, clock: Callable[[], float]) -> None:
    ticket = oracle.begin(plan, clock())
    try:
        if plan.hedge_after_s is not None:
            answer = await client.call(
                plan.work, hedge_after_s=plan.hedge_after_s, idempotent=True, timeout=plan.timeout_s
            )
            oracle.item(ticket, answer)
        elif not await _read(client, plan, oracle, ticket):
            oracle.left(ticket, clock())
            return
    except Exception as error:  # the oracle says which may be
        oracle.failed(ticket, error, clock())
    else:
        oracle.answered(ticket, clock())


async def _read(client: Client, plan: Plan, oracle: Oracle, ticket: Ticket) -> bool:
    """Read the stream; False where the caller left it."""
    stream = client.generate(
        plan.work, annotated=False, idempotent=plan.idempotent, resume=plan.resume, timeout=plan.timeout_s
    )
    if plan.leaves_after == 0:
        await stream.aclose()
        return False
    async for item in stream:
        oracle.item(ticket, item)
        if ticket.items == plan.leaves_after:
            return False
    return True
