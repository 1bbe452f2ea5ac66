"""The requests that a runtime serves at one moment, each with the place where it waits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from time import monotonic

import msgspec

from triton_distributed.context import AwaitedRequest, awaited_requests
from triton_distributed.serving.endpoint import ServedEndpoint
from triton_distributed.serving.request import ServedRequest
from triton_distributed.serving.state import OVER, RequestState
from triton_distributed.system.current_line import standing, steps


class AwaitedCall(msgspec.Struct, frozen=True):
    """A call that a handler has made and whose answer has not ended.

    Attributes:
        endpoint: the name of the called endpoint.
        instance_id: the worker that has the request or is about to get it.
        sent: whether the request has left.
    """

    endpoint: str
    instance_id: int
    sent: bool


class RequestReport(msgspec.Struct, frozen=True):
    """One request that a worker serves.

    Attributes:
        id: the request's id. The requests that its handler sends have the same id.
        endpoint: the name of the endpoint.
        instance_id: the worker's instance id.
        state: `waiting` (in the queue), `announced` (the handler is about to begin), `running`, or `cleaning` (the
            handler was cancelled and has not ended).
        age_s: seconds since it arrived.
        ahead: the number of requests of its endpoint that run or wait before it; 0 if it does not wait.
        remaining_s: seconds until its deadline, never below 0; None without a deadline.
        priority: see `Context.priority`.
        client: the address of the session on which it came, as this worker sees it.
        blocked: its caller does not read: the worker may send no further item until it does.
        calls: the calls that its handler waits for.
        line: the current line of its handler, as `file:line in function`; empty before the handler begins.
        stack: the steps of its handler's code, outermost first, in the same form; empty unless stacks were asked for.
    """

    id: str
    endpoint: str
    instance_id: int
    state: str
    age_s: float
    ahead: int
    remaining_s: float | None
    priority: int
    client: str
    blocked: bool
    calls: tuple[AwaitedCall, ...]
    line: str
    stack: tuple[str, ...] = ()


def requests_of(endpoints: Iterable[ServedEndpoint], stacks: bool = False) -> Iterator[RequestReport]:
    """Report the requests of these endpoints: the running ones, then the waiting ones in their order.

    The event loop may turn between two reports. A request that has ended meanwhile is left out.

    Args:
        stacks: also report the steps of the handlers' code, at some more cost.
    """
    for endpoint in endpoints:
        running = list(endpoint.gate.running)
        waiting = sorted(endpoint.gate.queue.waiting(), key=lambda each: -each.context.priority)  # It is stable.
        for place, request in enumerate((*running, *waiting)):
            if request.state != OVER:
                yield _report(endpoint, request, 0 if place < len(running) else place, stacks)


def _report(endpoint: ServedEndpoint, request: ServedRequest, ahead: int, stacks: bool) -> RequestReport:
    context, stream = request.context, request.stream
    deadline = context.deadline
    began = request.task is not None
    return RequestReport(
        id=context.id(),
        endpoint=str(endpoint.name),
        instance_id=endpoint.instance.id,
        state=RequestState(request.state).name.lower(),
        age_s=monotonic() - request.came,
        ahead=ahead,
        remaining_s=None if deadline is None else max(0.0, deadline - endpoint.loop.time()),
        priority=context.priority,
        client=stream.session.address,
        blocked=stream.credit <= 0,
        calls=tuple(map(_awaited, awaited_requests(context))),
        line=standing(request.task, request.items) if began else "",
        stack=tuple(steps(request.task, request.items)) if began and stacks else (),
    )


def _awaited(each: AwaitedRequest) -> AwaitedCall:
    return AwaitedCall(str(each.endpoint), each.instance_id, each.sent is not None)
