"""A client process: `python -m benchmarks.survival.client NAME`. It does what the phases of a run ask it to."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import uvloop

from benchmarks.processes import answer_questions
from benchmarks.survival.content import LIMITED, WORK
from benchmarks.survival.flood import Flood
from benchmarks.survival.load import Load
from benchmarks.survival.watching import Watching
from triton_distributed.runtime import Client, DistributedRuntime


class Answers:
    """What a client process answers, a method a question."""

    def __init__(self, name: str, runtime: DistributedRuntime, work: Client, limited: Client) -> None:
        self._name, self._runtime, self._work = name, runtime, work
        self._limited = limited
        self._load: Load | None = None
        self._watching: list[Watching] = []

    async def connect(self, workers: int) -> None:
        """Wait until all workers are known, and connect to each."""
        for client in (self._work, self._limited):
            await known(client, workers)
        request = {"key": "x-x-x", "items": 1, "pause_s": 0.0, "tail_s": 0.0, "every": 0}
        for each in self._work.instance_ids():
            async for _ in self._work.direct(request, each):
                pass

    async def begin(self, rate: float) -> None:
        """Begin the steady load: so many calls a second of each kind."""
        self._load = Load(self._work, self._name, rate)

    async def end(self, events: list[float], span_s: float) -> dict[str, Any]:
        """End the steady load."""
        assert self._load is not None
        return await self._load.end(events, span_s)

    async def saturate(self, callers: int, seconds: float, busy: bool) -> float:
        """Answers a second of so many callers, each of which calls again as soon as it has its answer."""
        return await Flood(self._limited, self._name, busy).saturate(callers, seconds)

    async def flood(self, phases: list[tuple[float, float]], timeout_s: float, busy: bool) -> list[dict[str, Any]]:
        """Calls at so many a second for so many seconds, one pair after the other."""
        return await Flood(self._limited, self._name, busy).phases(phases, timeout_s)

    async def watch(self, clients: int) -> None:
        """Make further clients, each in a runtime of its own with sessions of its own."""
        for number in range(clients):
            self._watching.append(await Watching.start(f"{self._name}.{number}"))

    async def aim(self, instance_id: int, workers: int) -> None:
        """Have each of them call often, and note what it knows of this instance."""
        await asyncio.gather(*(each.begin(instance_id, workers) for each in self._watching))

    async def seen(self) -> list[dict[str, Any]]:
        """End that; what each has noted."""
        return await asyncio.gather(*(each.end() for each in self._watching))


async def known(client: Client, count: int) -> None:
    """Wait until a client knows exactly so many instances."""
    changed = asyncio.Event()
    client.view.table.listeners.append(changed.set)
    while len(client.instance_ids()) != count:
        await changed.wait()
        changed.clear()
    client.view.table.listeners.remove(changed.set)


async def main(name: str) -> None:
    runtime = DistributedRuntime()
    clients = [await runtime.endpoint(path).client() for path in (WORK, LIMITED)]
    answers = Answers(name, runtime, *clients)

    async def answer(question: str, **arguments: Any) -> Any:
        return await getattr(answers, question)(**arguments)

    await answer_questions(answer)
    os._exit(0)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
