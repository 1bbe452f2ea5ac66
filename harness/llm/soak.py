"""Very many chats, of which some are left, while workers are killed: nothing may grow, and no text may be wrong."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from typing import Any

from harness.llm.client import Caller, Chat, Left
from harness.llm.stage import FRONT, Stage, staged
from harness.report import Found

WORKERS = ("w0", "w1", "w2")
KILL_S = 5.0
CALLERS = 48
LEFT_SHARE = 0.1
SHARES = (0.1, 0.45, 0.45)
"""The chats before the first look at memory, the second and the last. The heap gets its holes before the second."""
GROWTH_MIB = 4.0
"""Resident memory of the front end may grow by this much between the second look and the last."""
CLOSED_S = 6.0
"""A connection that has ended may be held by its timer of 5 s."""
GROWTH_OBJECTS = 1_000
"""So many objects may be added: series of metrics and caches fill up. One for each chat would be many thousands."""
ENGINE: dict[str, Any] = {"slots": 64, "ttft_ms": 2, "itl_ms": 1}


class Soak:
    """The load. Chats begin as soon as a caller is free.

    Attributes:
        counts: how many chats ended how.
        wrong: descriptions of what was wrong.
    """

    def __init__(self, stage: Stage, seed: int) -> None:
        self._stage, self._rng = stage, random.Random(seed)
        self._next = 0
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def load(self, chats: int) -> None:
        """Make this many chats more."""
        end = self._next + chats
        await asyncio.gather(*(self._call(end) for _ in range(CALLERS)))

    async def _call(self, end: int) -> None:
        rng, caller = self._rng, await Caller.connect(self._stage.url)
        while self._next < end:
            chat = Chat(self._next, rng.randint(1, 16), rng.random() < 0.5)
            self._next += 1
            if not caller.open:
                caller = await Caller.connect(self._stage.url)
            caller.send(chat)
            if rng.random() < LEFT_SHARE:
                with contextlib.suppress(TimeoutError, Left):
                    async with asyncio.timeout(rng.uniform(0, 0.03)):
                        await caller.whole()
                self.counts["answered just before the client left" if caller.answer.ended else "left"] += 1
                caller.leave(reset=rng.random() < 0.5)
                continue
            try:
                answer = await caller.whole()
            except Left as error:
                self._note("cut by the front end", f"chat {chat.number} {error}")
                continue
            if words := answer.wrong(chat):
                self._note("failed" if answer.error else "wrong", words)
            else:
                self.counts["exact, a stream" if chat.stream else "exact, whole"] += 1
        caller.leave(reset=False)

    def _note(self, kind: str, words: str) -> None:
        self.counts[kind] += 1
        if len(self.wrong) < 20:
            self.wrong.append(f"{kind}: {words}")


async def soak(settings: dict[str, str], chats: int, seed: int) -> Found:
    """Make this many chats, with a kill every 5 s."""
    found = Found()
    async with staged(settings) as stage:
        for name in WORKERS:
            await stage.start_worker(name, **ENGINE)
        await stage.listed("mock")
        load = Soak(stage, seed)
        began = time.monotonic()
        kills, looks = 0, []
        for share in SHARES:
            kills += await _killing(stage, load.load(round(share * chats)))
            await stage.all(
                [Chat(number, 4, True) for number in range(CALLERS)]
            )  # Connects the front end to all workers.
            await stage.settled()
            await asyncio.sleep(CLOSED_S)
            looks.append(await stage.quiet())
            if len(looks) < len(SHARES):
                await stage.ask_front("baseline")
        seconds = time.monotonic() - began
        left = await stage.left({FRONT: looks[0][FRONT]}, 15)
        left += [f"{name}: {each['slots']} requests" for name, each in looks[-1].items() if each.get("slots")]
        growths = await stage.ask_front("growths")
        faults = await stage.faults()
    first, was, now = (each[FRONT] for each in looks)
    grown_mib, objects = (now["rss"] - was["rss"]) / 2**20, now["objects"] - was["objects"]
    answered = sum(load.counts[each] for each in ("exact, a stream", "exact, whole"))
    found.figures = {
        "chats": chats,
        "chats a second": chats / (seconds - len(SHARES) * CLOSED_S),
        "workers killed": kills,
        **load.counts,
        "front end, MiB after 10 %, 55 % and all": ", ".join(
            f"{each['rss'] / 2**20:.1f}" for each in (first, was, now)
        ),
        "objects more": objects,
        "allocated more, KiB": (now["allocated"] - was["allocated"]) / 1024,
    }
    found.words = load.wrong + left + faults
    if objects > GROWTH_OBJECTS:
        found.words += [f"{kind}: {count} more" for part in ("types", "kept") for kind, count in growths[part].items()]
    caused = chats - answered - load.counts["left"] - load.counts["answered just before the client left"]
    found.promise("every answer that its client reads is exact", not caused, f"{caused} are not, of {answered}")
    found.promise(
        "memory is flat",
        grown_mib <= GROWTH_MIB and objects <= GROWTH_OBJECTS,
        f"{grown_mib:+.1f} MiB, {objects:+} objects",
    )
    found.promise("no slot, request, descriptor or task is left", not left, f"{len(left)} counts")
    found.promise("nothing in the logs that must not occur", not faults, f"{len(faults)} records")
    return found


async def _killing(stage: Stage, load: Any) -> int:
    """Kill a worker every 5 s while the load runs, and replace it; return how many."""
    kills = 0
    loading = asyncio.ensure_future(load)
    while not loading.done():
        await asyncio.wait({loading}, timeout=KILL_S)
        if not loading.done():
            name = WORKERS[kills % len(WORKERS)]
            await stage.fleet.kill(name)
            await stage.fleet.replace(name)
            kills += 1
    await loading
    return kills
