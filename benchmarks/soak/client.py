"""A client of the soak: `python -m benchmarks.soak.client NAME LOOP TRACE RATE SEED`, started by benchmarks.soak."""

from __future__ import annotations

import asyncio
import random
import sys
from typing import Any

from benchmarks.processes import answer_questions
from benchmarks.soak.calls import Caller, threaded
from benchmarks.soak.load import Load
from benchmarks.soak.news import News
from benchmarks.soak.vitals import Inventory, Said, sample
from benchmarks.soak.waiting import LOOPS, until
from benchmarks.soak.worker import touch
from triton_distributed.runtime import DistributedRuntime

AT_ONCE = 8  # more than a worker has threads for its handlers


async def main(name: str, trace: bool, rate: float, seed: int) -> None:
    said, inventory, rng = Said.listen(), Inventory(trace), random.Random(f"{seed} {name}")
    async with DistributedRuntime() as runtime:
        news = News(runtime, name)
        await news.open()
        caller = Caller(runtime, name, news, rng)
        await caller.open()
        load = Load(caller, rate, rng)

        async def answer(question: str, **arguments: Any) -> Any:
            if question == "go":
                return load.go()
            if question == "rest":
                return await load.rest()
            if question == "touch":
                ids = sorted(arguments["ids"])
                lasting = [each for endpoint, each in caller.clients.items() if endpoint != "coming"]
                await until(lambda: all(sorted(each.instance_ids()) == ids for each in lasting), f"exactly {ids} serve")
                await touch(caller.clients["facts"], ids)
                # at once, so that each worker starts all its threads
                await asyncio.gather(*(threaded(caller, each) for each in ids * AT_ONCE))
                return await news.publish()
            if question == "sample":
                return sample()
            if question == "quiet":
                return {**inventory.look(), "running": caller.open_calls, "news": news.tally()}
            if question == "baseline":
                return inventory.baseline()
            if question == "growths":
                return inventory.growths()
            if question == "tally":
                return {"outcomes": load.outcomes, "lost": load.lost, "failures": load.failures}
            if question == "said":
                return {"counts": said.counts, "faults": said.faults}
            raise ValueError(f"unknown question {question!r}")

        await answer_questions(answer)
        await load.close()
        await news.close()


if __name__ == "__main__":
    LOOPS[sys.argv[2]](main(sys.argv[1], sys.argv[3] == "trace", float(sys.argv[4]), int(sys.argv[5])))
