"""A process of a fleet: `python -m harness.member NAME [--loop uvloop|asyncio] PART …`. Its parts define its work.

A part is `MODULE:FUNCTION` or `MODULE:FUNCTION:ARGUMENT:…`. The function gets the `Member` and the arguments. It serves
endpoints, makes clients and adds questions. A member answers questions over its standard input and output
(`harness.processes`), or obeys the `ChaosCluster` that has started it.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from harness.processes import answer_questions
from harness.vitals import Inventory, LogCounter, sample
from harness.waiting import until
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.testing.chaos.control import look, obey

try:
    from uvloop import new_event_loop
except ImportError:  # There is no wheel for this platform.
    from asyncio import new_event_loop  # type: ignore[assignment]

Question = Callable[..., Any]


class Member:
    """A runtime, its endpoints, and the questions that the process answers.

    Attributes:
        name: the name of the process.
        runtime: the runtime of the process.
        questions: functions by name; a coroutine is awaited.
        closing: coroutine functions that end what the parts have started.
        open_calls: functions that count calls under way.
    """

    def __init__(self, name: str, runtime: DistributedRuntime, trace: bool) -> None:
        self.name, self.runtime = name, runtime
        self.serving: list[asyncio.Task[None]] = []
        self.closing: list[Callable[[], Awaitable[None]]] = []
        self.open_calls: list[Callable[[], int]] = []
        self.logged = LogCounter()
        self._inventory = Inventory(trace)
        self.questions: dict[str, Question] = {
            "id": lambda: runtime.instance_id,
            "addresses": lambda: look(runtime)["addresses"],
            "counts": lambda: {path: stats.outcomes() for path, stats in runtime.stats().items()},
            "sample": sample,
            "quiet": self._quiet,
            "baseline": self._inventory.baseline,
            "growths": self._inventory.growths,
            "logged": lambda: {"counts": self.logged.counts, "faults": self.logged.faults},
        }

    def serve(self, path: str, handler: Any, **limits: Any) -> None:
        """Serve an endpoint for as long as the process lives."""
        self.serving.append(self.runtime.endpoint(path).serve_endpoint(handler, **limits))

    async def registered(self) -> None:
        """Wait until clients can find all endpoints."""
        found = [task for task in self.serving if task.done()]
        for task in found:
            task.result()
        await until(lambda: len(look(self.runtime)["served"]) >= len(self.serving), f"{self.name} serves")

    async def answer(self, question: str, **arguments: Any) -> Any:
        """Answer a question."""
        found = self.questions[question](**arguments)
        return await found if inspect.isawaitable(found) else found

    def _quiet(self) -> dict[str, Any]:
        """The resources of the process after a garbage collection, and the number of requests and calls under way."""
        running = sum(each.inflight for each in self.runtime.stats().values())
        return {**self._inventory.look(), "running": running + sum(count() for count in self.open_calls)}


async def main(name: str, parts: list[str], trace: bool) -> None:
    """Run a member until its endpoints have drained, or until the end of its standard input."""
    async with DistributedRuntime() as runtime:
        obeys = obey(runtime)
        member = Member(name, runtime, trace)
        if obeys:
            logging.basicConfig(format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s")
        else:
            member.logged.listen()
        for part in parts:
            module, function, *arguments = part.split(":")
            await getattr(importlib.import_module(module), function)(member, *arguments)
        waiting: set[asyncio.Task[None]] = set(member.serving)
        if not obeys:
            await member.registered()
            waiting.add(asyncio.create_task(answer_questions(member.answer)))
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for close in member.closing:
            await close()
        for task in waiting - set(member.serving):
            task.cancel()
            await asyncio.wait({task})
        if obeys:
            await asyncio.gather(*member.serving)
    if member.logged.faults:
        raise SystemExit("\n".join(member.logged.faults))


def place(core: str, nice: int) -> None:
    """Bind this process to a core, if one is named, and lower its priority."""
    if core:
        os.sched_setaffinity(0, {int(core)})
    os.nice(nice)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m harness.member", description="A process of a fleet.")
    parser.add_argument("name", help="the name of the process")
    parser.add_argument("parts", nargs="*", help="MODULE:FUNCTION:ARGUMENT:…")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop", help="uvloop if it is installed")
    parser.add_argument("--trace", default="", help="keep where memory was allocated, if not empty")
    parser.add_argument("--core", default="", help="the only core that it may use")
    parser.add_argument("--nice", type=int, default=0, help="the nice value added to its own (0)")
    arguments = parser.parse_args()
    place(arguments.core, arguments.nice)
    factory = asyncio.new_event_loop if arguments.loop == "asyncio" else new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main(arguments.name, arguments.parts, bool(arguments.trace)))
    sys.exit()
