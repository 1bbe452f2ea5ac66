"""What a worker answers to questions about itself; see `runtime.inspection`. It is imported with the first question."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable
from itertools import islice
from typing import Any, Literal, Protocol

import msgspec

from triton_distributed.context import current
from triton_distributed.observe.stacks import stack
from triton_distributed.runtime.rates import counters_of
from triton_distributed.runtime.recording import Recording, is_recorded
from triton_distributed.runtime.reports import report_of
from triton_distributed.runtime.requests import RequestReport, requests_of
from triton_distributed.runtime.statistics import RuntimeStatistics
from triton_distributed.runtime.worker import Worker
from triton_distributed.serving.endpoint import ServedEndpoint
from triton_distributed.serving.handler_context import ServedContext
from triton_distributed.status.port import StatusPort
from triton_distributed.transport.fairness import FairShare

MOST_RECORDINGS = 2
"""Recordings at a time: each occupies one of the places above until its client leaves."""

PROBLEMS_AGE_S = 5.0
"""Seconds between two runs of the program's health checks for `trd top`, which asks each second."""

CHUNK = 100
"""Requests in one item of an answer. The event loop turns after each item, which takes about a millisecond."""


class Question(msgspec.Struct, forbid_unknown_fields=True):
    """What a client asks.

    Attributes:
        about: `worker` (one item, see `WorkerReport`; it costs the worker least), `counters` (one item, see
            `rates.Counters`), `statistics` (one item, see `RuntimeStatistics`), `requests` (items of up to `CHUNK`
            reports each), `stacks` (one item: the stack of each thread, by its name) or `recording` (first an empty
            item, then one `Exchange` for each request that has ended, until the caller leaves).
        id: only requests of this id; empty for all.
        stacks: reports of requests contain the steps of the handlers' code.
        endpoint: what is recorded, `namespace.component.endpoint`.
        metadata: metadata is recorded too.
    """

    about: Literal["worker", "counters", "statistics", "requests", "stacks", "recording"]
    id: str = ""
    stacks: bool = False
    endpoint: str = ""
    metadata: bool = False


class Inspected(Protocol):
    """The part of a runtime that is inspected."""

    worker: Worker
    instance_id: int
    status_port: StatusPort

    def statistics(self) -> RuntimeStatistics: ...


def answering(runtime: Inspected, share: FairShare) -> Callable[..., AsyncIterator[Any]]:
    """Make the handler of the reserved endpoint of a runtime.

    Args:
        runtime: the runtime.
        share: counts the bytes of its sessions.
    """

    async def inspect(question: Question) -> AsyncIterator[Any]:
        if question.about == "worker":
            yield msgspec.to_builtins(report_of(runtime.worker, await runtime.status_port.problems()))
        elif question.about == "counters":
            problems = await runtime.status_port.problems(PROBLEMS_AGE_S)
            yield msgspec.to_builtins(counters_of(runtime.instance_id, runtime.worker, share, problems))
        elif question.about == "statistics":
            yield msgspec.to_builtins(runtime.statistics())
        elif question.about == "stacks":
            yield _stacks()
        elif question.about == "recording":
            with Recording(_recordable(runtime, question.endpoint), question.metadata) as recording:
                yield {}
                context = current.get()
                async for exchange in recording:
                    if isinstance(context, ServedContext) and not context.fits(exchange):
                        recording.leave_out()
                    else:
                        yield exchange
        else:
            reports = requests_of(runtime.worker.server.endpoints, question.stacks)
            if question.id:
                reports = (each for each in reports if each.id == question.id)
            while chunk := list(islice(reports, CHUNK)):
                yield msgspec.to_builtins(chunk)
                await asyncio.sleep(0)

    return inspect


def _recordable(runtime: Inspected, name: str) -> ServedEndpoint:
    endpoints = runtime.worker.server.endpoints
    if sum(map(is_recorded, endpoints)) >= MOST_RECORDINGS:
        raise RuntimeError(f"this worker makes {MOST_RECORDINGS} recordings already")
    for each in endpoints:
        if str(each.name) == name:
            return each
    raise LookupError(f"this worker does not serve {name}")


def _stacks() -> dict[str, str]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {names.get(ident, f"thread {ident}"): stack(frame) for ident, frame in sys._current_frames().items()}


def read_reports(items: Any) -> list[RequestReport]:
    """The reports in one item of the answer about `requests`.

    Raises:
        msgspec.ValidationError: the worker has another version, whose reports differ.
    """
    return msgspec.convert(items, list[RequestReport])
