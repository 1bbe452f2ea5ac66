"""A worker of the soak: `python -m benchmarks.soak.worker NAME LOOP TRACE`, started by benchmarks.soak."""

from __future__ import annotations

import asyncio
import random
import sys
from typing import Any

from benchmarks.processes import answer_questions
from benchmarks.soak.handlers import COMPONENT, NAMESPACE, coming, handlers
from benchmarks.soak.news import News
from benchmarks.soak.vitals import Inventory, Said, sample
from benchmarks.soak.waiting import LOOPS, patiently, until
from triton_distributed.errors import RuntimeClosed
from triton_distributed.runtime import Client, DistributedRuntime
from triton_distributed.runtime.component import Component

STEADY = "steady"  # the worker whose endpoints are never paused


class Comings:
    """An endpoint that comes and goes, and one that is paused and resumed, until `rest` and again from `go`."""

    def __init__(self, component: Component, pauses: bool, rng: random.Random) -> None:
        self._component, self._pauses, self._rng = component, pauses, rng
        self._going, self._resting = asyncio.Event(), asyncio.Event()
        self._resting.set()
        self._task = asyncio.create_task(self._run())

    def go(self) -> None:
        self._going.set()

    async def rest(self) -> None:
        """Wait until everything is as it was in the beginning.

        Raises:
            Exception: what went wrong on the way.
        """
        self._going.clear()
        waiting = asyncio.create_task(self._resting.wait())
        await patiently(asyncio.wait({waiting, self._task}, return_when=asyncio.FIRST_COMPLETED))
        if self._task.done():
            waiting.cancel()
            self._task.result()

    async def _run(self) -> None:
        while True:
            await self._going.wait()
            self._resting.clear()
            try:
                await self._round()
            except RuntimeClosed:  # it drains
                return
            finally:
                self._resting.set()
            await asyncio.sleep(self._rng.uniform(0.2, 1.0))

    async def _round(self) -> None:
        serving = self._component.endpoint("coming").serve_endpoint(coming)
        await asyncio.wait({serving}, timeout=self._rng.uniform(0.1, 1.0))
        serving.cancel()
        await asyncio.wait({serving})
        if not serving.cancelled():
            serving.result()
        if self._pauses:
            await self._component.endpoint("facts").pause()
            await asyncio.sleep(self._rng.uniform(0.1, 0.5))
            await self._component.endpoint("facts").resume()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})


async def main(name: str, trace: bool) -> None:
    said, inventory = Said.listen(), Inventory(trace)
    async with DistributedRuntime() as runtime:
        component = runtime.namespace(NAMESPACE).component(COMPONENT)
        onward: list[Client] = []
        alive, served = handlers(runtime.instance_id, lambda: onward[0])
        onward.append(await component.endpoint("numbers").client())
        facts = await component.endpoint("facts").client()
        news = News(runtime, name)
        await news.open()
        serving = [
            component.endpoint(each).serve_endpoint(function, **limits) for each, (function, limits) in served.items()
        ]
        comings = Comings(component, name != STEADY, random.Random(name))
        # the signals that end it are heard from now on, and others can call it
        ours = runtime.instance_id
        await until(lambda: len(runtime.stats()) >= len(served) and ours in facts.instance_ids(), "it serves")

        async def answer(question: str, **arguments: Any) -> Any:
            if question == "id":
                return runtime.instance_id
            if question == "go":
                return comings.go()
            if question == "rest":
                return await comings.rest()
            if question == "touch":
                return await touch(facts, arguments["ids"])
            if question == "sample":
                return sample()
            if question == "quiet":
                running = alive.count + sum(each.inflight for each in runtime.stats().values())
                return {**inventory.look(), "running": running, "news": news.tally()}
            if question == "baseline":
                return inventory.baseline()
            if question == "growths":
                return inventory.growths()
            if question == "said":
                return {"counts": said.counts, "faults": said.faults}
            raise ValueError(f"unknown question {question!r}")

        questions = asyncio.create_task(answer_questions(answer))
        await asyncio.wait({questions, *serving}, return_when=asyncio.FIRST_COMPLETED)
        await comings.close()
        await news.close()
        questions.cancel()
        await asyncio.wait({questions})
    if said.faults:
        raise SystemExit("\n".join(said.faults))


async def touch(facts: Client, ids: list[int]) -> None:
    """See exactly these instances, and have a connection to each: what a process has when it is quiet."""
    await until(lambda: sorted(facts.instance_ids()) == sorted(ids), f"exactly {ids} serve")
    for each in ids:
        async for answer in facts.direct("touch", each, annotated=False):
            assert answer == {"asked": "touch", "by": each}, answer


if __name__ == "__main__":
    LOOPS[sys.argv[2]](main(sys.argv[1], sys.argv[3] == "trace"))
