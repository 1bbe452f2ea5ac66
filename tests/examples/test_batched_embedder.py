"""The batched embedder: single calls share batches, also while one of two workers is killed under load."""

from __future__ import annotations

import asyncio
import re

import pytest

import triton_distributed as trd
from tests.examples.programs import Program, run, serving
from tests.timing import PATIENCE_S

WORKER, CLIENT = "batched_embedder/worker.py", "batched_embedder/client.py"
EMBED = "examples.embedder.embed"


def test_batched_embedder():
    with serving(WORKER, served=True):
        found = re.fullmatch(r"64 vectors, batches of up to (\d+)", run(CLIENT)[0])
    assert found
    assert 2 <= int(found[1]) <= 32


@pytest.mark.leaves("socket files", reason="a killed worker cannot remove its socket")
def test_a_kill_under_load_costs_no_answer_of_an_idempotent_call():
    victim = Program(WORKER, served=True)
    answered = 0

    async def call(here: trd.Connection, places: asyncio.Semaphore, number: int) -> None:
        nonlocal answered
        async with places:
            answer = await here.call(EMBED, {"text": f"{number:04}"}, timeout=PATIENCE_S, idempotent=True)
        assert answer["vector"] == [float(ord(each)) for each in f"{number:04}"]
        answered += 1
        if answered == 100:
            victim.kill()

    async def main() -> None:
        async with trd.connect() as here, asyncio.timeout(PATIENCE_S):
            await here.wait_for_instances(EMBED, 2, timeout=PATIENCE_S)
            places = asyncio.Semaphore(64)
            async with asyncio.TaskGroup() as calls:
                for number in range(600):
                    calls.create_task(call(here, places, number))

    try:
        with serving(WORKER, served=True):
            asyncio.run(main())
    finally:
        victim.kill()
    assert answered == 600
