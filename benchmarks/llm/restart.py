"""`python -m benchmarks.llm.restart`: a router is killed and starts again while workers hold a million blocks.

Eight worker processes hold prompts of 125 blocks each, none in two workers. In each round a router starts in a new
process, sends requests from the beginning, and is killed when it has been right for some time. The overlaps of 400
prompts are then compared with what the workers hold. It writes results/restart.json.

- `right_s`: from the start of the process until the router knows all blocks of all workers. `index_s` counts from its
  first line of code that is not an import.
- `late_ms`: a timer looks each ms how late the loop is, and this is the worst.
- `right_cpu_s`, `computed_ms`: the same without the time in which the machine ran other programs: the processor time of
  the process until it is right, and the most processor time of the loop between two looks.
- `stalls`: those of 20 ms or more that the watchdog has counted. It leaves out the time without a processor, too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from array import array
from collections.abc import AsyncIterator
from typing import Any

import uvloop

from benchmarks.rounds import RESULTS, Figures, Run
from harness.processes import ROOT, Child, ChildFailed, answer_questions, environment_without_settings
from triton_distributed.api.connection import connect
from triton_distributed.api.contracts import Stream
from triton_distributed.config import Config
from triton_distributed.llm import Engine, Model, ModelCard, Output, Request, packed, serve_model
from triton_distributed.llm.contract.cache import BlocksStored, CacheEvents, Publish
from triton_distributed.llm.router.model_router import ModelRouter
from triton_distributed.llm.routing.keys import block_keys
from triton_distributed.llm.routing.policies.kv import kv
from triton_distributed.llm.routing.router import Router
from triton_distributed.llm.routing.view import Question

MODEL = Model(card=ModelCard(name="held", kv_block_tokens=64), tokenizer="bytes")
BLOCKS = 125
"""Of a prompt."""

WATCHDOG_S = 0.02
BEAT_S = 0.001
CALLERS = 4
ASKED = 400
AFTER_S = 0.5
"""Seconds in which the router goes on after it is right: the old index is swept, requests go on."""


def prompt(number: int) -> bytes:
    """One token, again and again: a key depends on all blocks before it, so no two are equal."""
    return packed(array("I", [number]) * (64 * BLOCKS))


class Holder(Engine):
    """Holds prompts, and answers at once."""

    def __init__(self, first: int, count: int) -> None:
        self.model = MODEL
        self.slots = 256
        self._first, self._count = first, count
        self._publish: Publish | None = None

    def kv_events(self, publish: Publish) -> bool:
        """Take what gets the events."""
        self._publish = publish
        return True

    async def start(self) -> None:
        """Report the prompts."""
        assert self._publish is not None
        for number in range(self._first, self._first + self._count):
            names = range(BLOCKS * number, BLOCKS * (number + 1))
            stored = BlocksStored(hashes=list(names), parent=None, tokens=prompt(number), block_tokens=64)
            self._publish(CacheEvents([stored]))

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """Answer."""
        yield Output([1], finish_reason="length")


async def work(first: int, count: int) -> None:
    """The program of a worker."""
    async with connect(Config.from_env()) as here:
        served = await serve_model(here, Holder(first, count))

        async def answer(question: str) -> Any:
            return served.instance.id

        await answer_questions(answer)


async def route(begun_s: float, owners: list[int], count: int) -> dict[str, Any]:
    """The program of the router: be right, and answer meanwhile.

    Args:
        begun_s: when the process was started, on `time.monotonic`.
        owners: the instances of the workers.
        count: prompts of each.
    """
    entered_s = time.monotonic()
    late = computed = 0.0
    waits: list[float] = []
    chance = random.Random(1)
    right_s = 0.0

    async with connect(Config.from_env()) as here:
        loop = asyncio.get_running_loop()

        def beat(due: float, before: float) -> None:
            nonlocal late, computed
            now, used = loop.time(), time.thread_time()
            late, computed = max(late, now - due), max(computed, used - before)
            loop.call_later(BEAT_S, beat, now + BEAT_S, used)

        beat(loop.time(), time.thread_time())
        router = ModelRouter(here, ("models", MODEL.published.component), Router(kv, "kv"))
        endpoint = Stream[Request, Output](f"models.{MODEL.published.component}.generate")
        answered_before = 0

        async def caller() -> None:
            nonlocal answered_before
            while True:
                begin = time.perf_counter()
                asked = prompt(chance.randrange(count * len(owners)))
                placed = await router.place(Question(tokens=len(asked) // 4, keys=block_keys(asked, 64)))
                try:
                    request = Request(prompt=asked, router=router.id)
                    async for _ in here.stream(endpoint, request, policy=placed, timeout=30, idempotent=True):
                        placed.first_output(0)
                finally:
                    placed.release()
                waits.append(time.perf_counter() - begin)
                answered_before += not right_s
                await asyncio.sleep(0.002)

        callers = [asyncio.create_task(caller()) for _ in range(CALLERS)]
        while not (len(found := router.states()) == len(owners) and all(each.watched for each in found)):
            await asyncio.sleep(0.002)
        right_s, right_cpu_s = time.monotonic(), time.process_time()
        await asyncio.sleep(AFTER_S)
        for each in callers:
            each.cancel()
        ended = await asyncio.gather(*callers, return_exceptions=True)
        wrong = [repr(each) for each in ended if not isinstance(each, asyncio.CancelledError)]
        late_ms, computed_ms = late * 1e3, computed * 1e3
        for _ in range(ASKED):
            number = chance.randrange(count * len(owners))
            found_depths = router.core.index.depths(block_keys(prompt(number), 64))
            if found_depths != {(owners[number // count], 0): BLOCKS}:
                wrong.append(f"prompt {number}: {found_depths}")
        waits.sort()
        figures = {
            "right_s": right_s - begun_s,
            "index_s": right_s - entered_s,
            "right_cpu_s": right_cpu_s,
            "late_ms": late_ms,
            "computed_ms": computed_ms,
            "stalls": here.runtime.loop_stats.stalls,
            "answered": answered_before,
            "answer_p50_ms": waits[len(waits) // 2] * 1e3,
            "answer_max_ms": waits[-1] * 1e3,
            "blocks": len(router.core.index),
        }
        await router.close()
    return {"figures": figures, "wrong": wrong}


async def restarted(settings: dict[str, str], owners: list[int], count: int) -> Figures:
    """Start a router, let it be right, and kill it."""
    begun = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.llm.restart", "--route", str(begun), str(count), *map(str, owners)),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**environment_without_settings(), **settings},
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    if not line:
        raise ChildFailed("the router ended without figures")
    found = json.loads(line)
    if found["wrong"]:
        raise ChildFailed(f"{len(found['wrong'])} wrong: {found['wrong'][0]}")
    figures: Figures = found["figures"]
    return figures


async def measured(options: argparse.Namespace) -> Run:
    """Take all rounds."""
    run = Run()
    count = options.blocks // BLOCKS // options.workers
    with tempfile.TemporaryDirectory() as place:
        settings = {"TRD_DIR": place, "TRD_WATCHDOG_S": str(WATCHDOG_S)}
        workers: list[Child] = []
        try:
            for number in range(options.workers):
                arguments = ("--work", str(number * count), str(count))
                workers.append(await Child.start("benchmarks.llm.restart", *arguments, environ=settings))
            owners = [await each.ask("instance") for each in workers]
            for done in range(options.rounds):
                print(f"round {done + 1} of {options.rounds}", flush=True)
                await run.take("restart", "ours", lambda: restarted(settings, owners, count))
        finally:
            await asyncio.gather(*(each.stop() for each in workers))
    return run


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llm.restart", description="A router starts again")
    parser.add_argument("--rounds", type=int, default=5, help="starts of the router (5)")
    parser.add_argument("--workers", type=int, default=8, help="worker processes (8)")
    parser.add_argument("--blocks", type=int, default=1_000_000, help="that they hold together (1000000)")
    parser.add_argument("--work", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--route", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        uvloop.run(work(*options.work))
        return 0
    if options.route:
        begun, count, *owners = options.route
        print(json.dumps(uvloop.run(route(float(begun), [int(each) for each in owners], int(count)))), flush=True)
        os.close(1)
        time.sleep(60)  # Until it is killed.
        return 0
    run = uvloop.run(measured(options))
    whole = options.blocks >= 1_000_000 and options.rounds >= 3
    path = RESULTS / ("restart.json" if whole else "partial-restart.json")
    result = run.write(path, rounds=options.rounds, quick=not whole, workers=options.workers, blocks=options.blocks)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
