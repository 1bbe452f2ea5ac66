"""Two models that come and go under load: what their callers see."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from harness.llm.client import Answer, Caller, Chat, Left
from harness.llm.stage import Stage, staged
from harness.report import Found

MODELS = ("apple", "pear")
CALLERS = 8  # Of each model. An answer that SIGKILL cuts goes on at the next worker.
LIMIT_S = 1.0
"""This long after the end of its only worker, requests for a model get no other answer than 404."""
PRESENT_S, ABSENT_S = 0.7, 1.3
MISSING = "404"


class Calling:
    """Callers of one model, until `stop`. Each calls again as soon as it has an answer.

    Attributes:
        ends: (began, ended, kind, words) of each chat, in the order of their ends.
    """

    def __init__(self, url: str, model: str) -> None:
        self._url, self._model, self._stopped = url, model, False
        self.ends: list[tuple[float, float, str, str]] = []
        self._tasks = [asyncio.create_task(self._call(number)) for number in range(CALLERS)]

    async def stop(self) -> None:
        """End after the present chats."""
        self._stopped = True
        await asyncio.gather(*self._tasks)

    async def _call(self, number: int) -> None:
        caller = await Caller.connect(self._url)
        while not self._stopped:
            chat = Chat(number, 8, stream=number % 2 == 0, model=self._model)
            if not caller.open:
                caller = await Caller.connect(self._url)
            began = time.monotonic()
            caller.send(chat)
            try:
                async with asyncio.timeout(60):
                    answer = await caller.whole()
            except (Left, TimeoutError) as error:
                self.ends.append((began, time.monotonic(), type(error).__name__, str(error)))
                caller.leave(reset=True)
                continue
            words = answer.wrong(chat)
            self.ends.append((began, time.monotonic(), _kind(answer, words), words))
            await asyncio.sleep(0.002)
        caller.leave(reset=False)


def _kind(answer: Answer, words: str) -> str:
    if answer.status == 200:
        return "exact" if not words else "error in the stream" if answer.error else "wrong"
    return str(answer.status)


@dataclass
class Stay:
    """One stay of a model: of its only worker.

    Attributes:
        how: the signal that ended it.
        began: before the worker was started.
        ended: when it had ended.
    """

    how: str
    began: float
    ended: float


async def changes(settings: dict[str, str], cycles: int) -> Found:
    """Let two models come and go under load, in turn by SIGKILL and by SIGTERM of their only workers."""
    found = Found()
    async with staged(settings) as stage:
        before = await stage.quiet()
        load = {name: Calling(stage.url, name) for name in MODELS}
        stays = dict(zip(MODELS, await asyncio.gather(*(_stays(stage, name, cycles) for name in MODELS)), strict=True))
        for each in load.values():
            await each.stop()
        left = await stage.left(before)
        faults = await stage.faults()
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    after = {"SIGTERM": 0.0, "SIGKILL": 0.0}
    for model, calling in load.items():
        for began, ended, kind, words in calling.ends:
            cut = any(stay.how == "SIGKILL" and began < stay.ended < ended for stay in stays[model])
            counts[f"{kind}, cut by SIGKILL" if cut and kind != MISSING else kind] += 1
            if kind not in ("exact", MISSING) and not cut:
                near = min(stays[model], key=lambda stay: abs(stay.ended - ended))
                when = f"{1000 * (began - near.ended):.0f} to {1000 * (ended - near.ended):.0f} ms after {near.how}"
                wrong.append(f"{model}: {kind}, {when}, {words[:200]}")
            for stay, following in pairwise([*stays[model], Stay("", math.inf, math.inf)]):
                if kind != MISSING and stay.ended < began and ended < following.began:
                    after[stay.how] = max(after[stay.how], began - stay.ended)
    found.words = wrong[:20] + left + faults
    found.figures = {"stays of a model": cycles * len(MODELS), **counts}
    found.promise(
        "a chat that no SIGKILL cuts is exact, or 404", not wrong, f"{len(wrong)} of {counts.total():,} are not"
    )
    for how, seconds in after.items():
        found.promise(
            f"{how}: after {LIMIT_S:g} s, each new request gets a 404",
            seconds <= LIMIT_S,
            f"the last one that did not began {1000 * seconds:.0f} ms after the worker's end",
        )
    found.promise("no request, descriptor or task is left", not left, f"{len(left)} counts")
    found.promise("nothing in the logs that must not occur", not faults, f"{len(faults)} records")
    return found


async def _stays(stage: Stage, model: str, cycles: int) -> list[Stay]:
    await asyncio.sleep(PRESENT_S / 2 * MODELS.index(model))
    found = []
    for number in range(cycles):
        how = "SIGTERM" if number % 2 else "SIGKILL"
        began = time.monotonic()
        process = await stage.start_worker(model, name=model, ttft_ms=2, itl_ms=2)
        await asyncio.sleep(PRESENT_S)
        if how == "SIGKILL":
            ended = await stage.fleet.kill(model)
        else:
            process.send(signal.SIGTERM)
            child = await process.leave()
            await child.process.wait()
            ended = time.monotonic()
            await child.stop()
        found.append(Stay(how, began, ended))
        await asyncio.sleep(ABSENT_S)
    return found
