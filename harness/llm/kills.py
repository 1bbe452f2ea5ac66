"""Workers that are killed under answers: each text is that of an undisturbed run, and nothing is left."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from harness.llm.client import Chat
from harness.llm.stage import Stage, staged
from harness.report import Found

TOKENS = 100
ITL_MS = 20
WORKERS = ("w0", "w1", "w2")
KILLED = WORKERS[1:]  # One each round, at a third and at two thirds of the answers. The first worker must keep nothing.
ENGINE: dict[str, Any] = {"slots": 256, "ttft_ms": 10, "itl_ms": ITL_MS}


async def kills(settings: dict[str, str], answers: int, rounds: int) -> Found:
    """Kill two of three workers in each round, under this many answers; every fourth is not a stream."""
    found = Found()
    chats = [Chat(number, TOKENS, number % 4 != 0) for number in range(answers)]
    async with staged(settings) as stage:
        for name in WORKERS:
            await stage.start_worker(name, **ENGINE)
        await stage.listed("mock")
        undisturbed = await stage.all(chats)
        wrong = [words for chat, answer in zip(chats, undisturbed, strict=True) if (words := answer.wrong(chat))]
        before = await stage.quiet()
        cut = different = 0
        for number in range(rounds):
            killing = asyncio.create_task(_kill_both(stage, random.Random(number)))
            disturbed = await stage.all(chats)
            cut += await killing
            for chat, answer, other in zip(chats, disturbed, undisturbed, strict=True):
                if words := answer.wrong(chat):
                    wrong.append(f"round {number}: {words}")
                different += (answer.text, answer.usage) != (other.text, other.usage)
        left = await stage.left({name: each for name, each in before.items() if name not in KILLED})
        left += [
            f"{name}: {count} requests after its answers"
            for name, each in (await stage.quiet()).items()
            if (count := each.get("slots", 0))
        ]
        faults = await stage.faults()
    found.words = wrong[:20] + left + faults
    found.figures = {"answers": rounds * answers, "kills": rounds * len(KILLED), "cut": cut}
    found.promise("every text and usage equals those of an undisturbed run", not different, f"{different} differ")
    found.promise("no answer fails, or is short or wrong", not wrong, f"{len(wrong)} of {rounds * answers}")
    found.promise("every kill cut answers", cut >= 10 * rounds, f"{cut} cut")
    found.promise("no slot, request, descriptor or task is left", not left, f"{len(left)} counts")
    found.promise("nothing in the logs that must not occur", not faults, f"{len(faults)} records")
    return found


async def _kill_both(stage: Stage, rng: random.Random) -> int:
    """Kill two workers under the answers, and start others in their places; return how many answers they had."""
    cut, last = 0, TOKENS * ITL_MS / 1000
    starting = []
    for number, name in enumerate(KILLED, 1):
        await asyncio.sleep(rng.uniform(0.7, 1) * last / 3 * (1 if number == 1 else 0.7))
        cut += sum((await stage.fleet.processes[name].ask("requests")).values())
        await stage.fleet.kill(name)
        starting.append(asyncio.create_task(stage.fleet.replace(name)))
    await asyncio.gather(*starting)
    return cut
