"""The fleet of a run: a front end and its workers, and what they have left when they are idle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from harness.fleet import Fleet, Process
from harness.llm.client import ANSWER_TOKENS, Answer, Caller, Chat
from harness.waiting import PATIENCE_S

PART = "harness.llm.members"
FRONT = "front"
COUNTS = ("descriptors", "tasks", "running")  # Threads of a pool start when they are needed, and stay.


class Stage:
    """A front end with workers.

    Attributes:
        fleet: all processes.
        url: of the front end.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.url = ""

    async def start_worker(self, at: str, *, queue: str = "", stamped: bool = False, **options: object) -> Process:
        """Start a worker at a place of the fleet. The options are those of the mock engine."""
        given = {"answer_tokens": ANSWER_TOKENS, **options}
        words = [f"{PART}:worker", queue, "stamped" if stamped else "", *(f"{k}={v}" for k, v in given.items())]
        return await self.fleet.start(at, ":".join(words))

    async def ask_front(self, question: str) -> Any:
        """Return an answer of the front end."""
        return await self.fleet.processes[FRONT].ask(question)

    async def listed(self, *names: str) -> None:
        """Wait until exactly these models are listed."""
        async with asyncio.timeout(PATIENCE_S):
            while sorted(await self.ask_front("models")) != sorted(names):
                await asyncio.sleep(0.01)

    async def all(self, chats: Sequence[Chat]) -> list[Answer]:
        """Return the answers to chats that run at once, each on a connection of its own."""
        callers = [await Caller.connect(self.url) for _ in chats]
        for caller, chat in zip(callers, chats, strict=True):
            caller.send(chat)
        try:
            return [await caller.whole() for caller in callers]
        finally:
            for caller in callers:
                caller.leave(reset=True)

    async def settled(self) -> None:
        """Wait until nothing runs in the front end."""
        async with asyncio.timeout(PATIENCE_S):
            while (await self.ask_front("quiet"))["running"]:
                await asyncio.sleep(0.1)

    async def quiet(self) -> dict[str, dict[str, int]]:
        """Return the resources of the processes that run, and the slots that engines hold (`slots`)."""
        names = [name for name, each in self.fleet.processes.items() if each.child is not None]
        found = await self.fleet.ask(names, "quiet")
        for name in names:
            if name != FRONT:
                found[name]["slots"] = sum((await self.fleet.processes[name].ask("requests")).values())
        return found

    async def left(self, before: dict[str, dict[str, int]], patience_s: float = 5.0) -> list[str]:
        """Return what the processes have more than before, if they still have it after `patience_s`."""
        end = asyncio.get_running_loop().time() + patience_s
        while True:
            now = await self.quiet()
            found = [
                f"{name}: {count} {was[count]} before, {now[name][count]} now"
                for name, was in before.items()
                if name in now
                for count in (*COUNTS, "slots")
                if count in was and now[name][count] > was[count]
            ]
            if not found or asyncio.get_running_loop().time() > end:
                return found
            await asyncio.sleep(0.1)

    async def faults(self) -> list[str]:
        """Return the log records that must not occur."""
        names = [name for name, each in self.fleet.processes.items() if each.child is not None]
        found = await self.fleet.ask(names, "logged")
        return [f"{name}: {each}" for name, logged in found.items() for each in logged["faults"]]


@asynccontextmanager
async def staged(settings: dict[str, str], routing: str = "kv") -> AsyncIterator[Stage]:
    """Start the front end; end all processes afterwards.

    Args:
        settings: of the processes.
        routing: the front end's policy.
    """
    async with Fleet(settings) as fleet:
        stage = Stage(fleet)
        await fleet.start(FRONT, f"{PART}:front:{routing}")
        stage.url = await stage.ask_front("url")
        yield stage
