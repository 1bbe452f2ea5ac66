"""The processes of the runs: a front end, and workers with mock engines. The functions are parts of a `Member`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from harness.member import Member
from triton_distributed.api.connection import connect
from triton_distributed.llm import Output, Request, serve_model
from triton_distributed.llm.contract.request import unpacked
from triton_distributed.llm.engines.mock.engine import MockEngine
from triton_distributed.llm.http.app import openai_app
from triton_distributed.llm.http.front import front_end
from triton_distributed.llm.http.serve import listen, serve, url_of
from triton_distributed.llm.models.models import Models

QUEUE_LOOK_S = 0.002
"""Seconds between two looks at the queue of a worker: the precision of the times at which requests left it."""


async def front(member: Member, routing: str) -> None:
    """Serve HTTP with the parts that `trd http` has, in a process that answers questions.

    Questions: `url`; `models`, the names that are listed.

    Args:
        member: the process.
        routing: the policy that chooses workers.
    """
    connection = connect(runtime=member.runtime)
    models = Models(connection, routing=routing)
    await models.__aenter__()
    app = await front_end(connection, openai=openai_app(models), models=models, access_log=False)
    listening = listen("127.0.0.1", 0)
    ready = asyncio.Event()
    task = asyncio.create_task(serve(app, listening, drain_timeout_s=1, ready=lambda _: ready.set()))
    await ready.wait()
    url = url_of(listening)
    member.questions |= {"url": lambda: url, "models": lambda: [each.card.name for each in models.list()]}
    member.open_calls.append(lambda: app.running)

    async def close() -> None:
        task.cancel()
        await asyncio.wait({task})
        await models.__aexit__()

    member.closing.append(close)


class Stamped(MockEngine):
    """A mock engine that notes when it begins and ends with each request.

    The prompt of a request contains its number between two `#`. Times are of the monotonic clock, which all processes
    of a machine share.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.began: dict[str, float] = {}
        self.freed: dict[str, float] = {}

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """Answer as the mock engine does."""
        number = bytes(unpacked(request.prompt).tolist()).split(b"#", 2)[1].decode()
        self.began[number] = time.monotonic()
        stream = super().generate(request)
        try:
            async for output in stream:
                yield output
        finally:
            await stream.aclose()
            self.freed[number] = time.monotonic()


async def worker(member: Member, queue: str, stamped: str, *options: str) -> None:
    """Serve a model by a mock engine.

    Questions: `stamps`, the times at which the engine began with requests and ended, and the queue became shorter;
    `requests`, those of the engine that are active or wait, and those that wait for a slot.

    Args:
        member: the process.
        queue: how many requests may wait beyond the slots; empty for the default.
        stamped: `stamped` to keep times; they need memory without end.
        options: of the engine, as KEY=VALUE.
    """
    given: dict[str, Any] = dict(each.split("=", 1) for each in options)
    engine = (Stamped if stamped else MockEngine)(**given)
    connection = connect(runtime=member.runtime)
    serving = await serve_model(connection, engine, max_queue=int(queue) if queue else None)
    left: list[float] = []
    if isinstance(engine, Stamped):
        watch = asyncio.create_task(_watch_queue(member, left))
        member.closing.append(lambda: _cancelled(watch))

        def stamps() -> dict[str, Any]:
            found = {"began": engine.began, "freed": engine.freed, "unqueued": left[:]}
            engine.began, engine.freed = {}, {}
            left.clear()
            return found

        member.questions["stamps"] = stamps
    member.questions["requests"] = lambda: {
        "active": engine.metrics().active,
        "waiting": engine.metrics().waiting,
        "queued": _queued(member),
    }
    member.serving.append(asyncio.ensure_future(serving.until_drained()))


def _queued(member: Member) -> int:
    return sum(len(each.gate.queue) for each in member.runtime.worker.server.endpoints)


async def _watch_queue(member: Member, left: list[float]) -> None:
    before = 0
    while True:
        now = _queued(member)
        left += [time.monotonic()] * (before - now)
        before = now
        await asyncio.sleep(QUEUE_LOOK_S)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})
