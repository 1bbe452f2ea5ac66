"""Makes the calls of a chaos run through an ordinary client and tells the oracle what came of each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import msgspec

from harness.oracle import Oracle, Ticket
from harness.requests import Plan, Shape, Work
from triton_distributed.errors import ConnectionFailed, RuntimeClosed, StreamIncomplete
from triton_distributed.runtime import Client, ResponseStream

# How a call may end whose own runtime is shut down.
ABANDONED = (RuntimeClosed, StreamIncomplete, ConnectionFailed)


async def make_calls(
    client: Client,
    plans: Iterable[Plan],
    oracle: Oracle,
    clock: Callable[[], float],
    *,
    two_way: Client | None = None,
) -> None:
    """Make each call at its time, whatever became of those before; returns when all have ended.

    Args:
        client: of the endpoint that `requests.handler` serves.
        plans: the calls, in the order of their time.
        oracle: is told of each.
        clock: seconds; also what `Plan.at_s` is counted on, from now.
        two_way: of the endpoint that `requests.echo` serves, where calls are to stream requests.
    """
    started = clock()
    async with asyncio.TaskGroup() as calls:
        for plan in plans:
            wait = started + plan.at_s - clock()
            if wait > 0:
                await asyncio.sleep(wait)
            target = two_way if plan.work.shape == Shape.TWO_WAY and two_way is not None else client
            calls.create_task(_call(target, plan, oracle, clock))


async def _call(client: Client, plan: Plan, oracle: Oracle, clock: Callable[[], float]) -> None:
    ticket = oracle.begin(plan, clock())
    limit = asyncio.timeout(plan.cancel_after_s)
    try:
        async with limit:
            whole = await _answer(client, plan, oracle, ticket)
    except Exception as error:  # the oracle says which may be
        if limit.expired() and type(error) is TimeoutError:  # the call's own is a DeadlineExceeded
            oracle.cancelled(ticket, clock())
        elif client.closing and isinstance(error, ABANDONED):
            oracle.abandoned(ticket, clock())
        else:
            oracle.failed(ticket, error, clock())
    else:
        (oracle.answered if whole else oracle.left)(ticket, clock())


async def _answer(client: Client, plan: Plan, oracle: Oracle, ticket: Ticket) -> bool:
    """Make the call and read what it answers; False where the caller left it."""
    if plan.hedge_after_s is not None:
        answer = await client.call(plan.work, hedge_after_s=plan.hedge_after_s, idempotent=True, timeout=plan.timeout_s)
        oracle.item(ticket, answer)
        return True
    stream = _begin(client, plan)
    if plan.leaves_after == 0:
        await stream.aclose()
        return False
    async for item in stream:
        oracle.item(ticket, item)
        if ticket.items == plan.leaves_after:
            return False
    return True


def _begin(client: Client, plan: Plan) -> ResponseStream:
    options: dict[str, Any] = {
        "annotated": False,
        "idempotent": plan.idempotent,
        "resume": plan.resume,
        "timeout": plan.timeout_s,
        "priority": plan.priority,
    }
    request = _requests(plan) if plan.work.shape == Shape.TWO_WAY else plan.work
    if plan.directly:
        known = client.instance_ids() or [1]
        return client.direct(request, known[plan.work.id % len(known)], **options)
    return client.generate(request, **options)


async def _requests(plan: Plan) -> AsyncIterator[Work]:
    for part in range(plan.work.items):
        yield msgspec.structs.replace(plan.work, part=part)
        if plan.work.pause_s:
            await asyncio.sleep(plan.work.pause_s)
