"""Makes calls through ordinary clients. The oracle judges each call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import msgspec

from harness.oracle import Oracle, Ticket
from harness.requests import Leave, Plan, Shape, Work
from triton_distributed.errors import ConnectionFailed, RuntimeClosed, StreamIncomplete
from triton_distributed.runtime import Client, Context, ResponseStream

# The errors with which a call may end after its own runtime was shut down.
ABANDONED = (RuntimeClosed, StreamIncomplete, ConnectionFailed)


async def make_calls(
    clients: Mapping[str, Client], plans: Iterable[Plan], oracle: Oracle, clock: Callable[[], float]
) -> None:
    """Make each call at its time, regardless of earlier calls; return when all calls have ended.

    Args:
        clients: the clients by endpoint.
        plans: the calls, in the order of their time.
        oracle: judges each call.
        clock: returns seconds; `Plan.at_s` counts from now on this clock.
    """
    started = clock()
    async with asyncio.TaskGroup() as calls:
        for plan in plans:
            wait = started + plan.at_s - clock()
            if wait > 0:
                await asyncio.sleep(wait)
            calls.create_task(make_call(clients[plan.via], plan, oracle, clock))


async def make_call(
    client: Client, plan: Plan, oracle: Oracle, clock: Callable[[], float], due_s: float | None = None
) -> Ticket:
    """Make one call and let the oracle judge it.

    Args:
        client: the endpoint's client.
        plan: the call.
        oracle: judges the call.
        clock: returns seconds.
        due_s: when the call should have been made, from which its time counts; None for now.
    """
    ticket = oracle.begin(plan, clock() if due_s is None else due_s)
    limit = asyncio.timeout(plan.cancel_after_s)
    try:
        async with limit:
            whole = await _answer(client, plan, oracle, ticket, clock)
    except Exception as error:  # The oracle knows which errors are allowed.
        if limit.expired() and type(error) is TimeoutError:  # The call's own timeout is a DeadlineExceeded.
            oracle.cancelled(ticket, clock())
        elif client.closing and isinstance(error, ABANDONED):
            oracle.abandoned(ticket, clock())
        else:
            oracle.failed(ticket, error, clock())
    else:
        (oracle.answered if whole else oracle.left)(ticket, clock())
    return ticket


async def _answer(client: Client, plan: Plan, oracle: Oracle, ticket: Ticket, clock: Callable[[], float]) -> bool:
    """Make the call and read its answer. False if the caller left it."""
    if plan.hedge_after_s is not None:
        answer = await client.call(plan.work, hedge_after_s=plan.hedge_after_s, idempotent=True, timeout=plan.timeout_s)
        oracle.item(ticket, answer, clock())
        return True
    context = Context() if plan.leaves_by == Leave.KILL else None
    stream = _begin(client, plan, context)
    if plan.leaves_by == Leave.DROP:
        return False
    if plan.leaves_by == Leave.CANCEL:
        stream.cancel()
        return False
    if plan.leaves_after == 0 and context is None:
        await stream.aclose()
        return False
    try:
        async for item in stream:
            oracle.item(ticket, item, clock())
            if ticket.items == plan.leaves_after:
                if context is None:
                    return False
                context.kill()
            if plan.reads_s:
                await asyncio.sleep(plan.reads_s)
    except asyncio.CancelledError:
        if context is None or not context.is_killed():
            raise
        return False
    return context is None


def _begin(client: Client, plan: Plan, context: Context | None) -> ResponseStream:
    options: dict[str, Any] = {
        "annotated": False,
        "idempotent": plan.idempotent,
        "resume": plan.resume,
        "timeout": plan.timeout_s,
        "priority": plan.priority,
        "context": context,
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
