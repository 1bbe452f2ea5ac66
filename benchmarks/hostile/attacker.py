"""The attacker: `python -m benchmarks.hostile.attacker CORE`, at the lowest priority."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

from benchmarks.hostile.attacks import ATTACKS
from benchmarks.processes import answer_questions


async def main(core: str) -> None:
    if core:
        os.sched_setaffinity(0, {int(core)})
    os.nice(19)

    async def answer(attack: str, address: str, seconds: float) -> Any:
        until = time.monotonic() + seconds
        return await asyncio.to_thread(ATTACKS[attack].run, address, until)

    await answer_questions(answer)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
