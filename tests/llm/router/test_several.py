"""Several front ends in virtual time: each has a router, and together they use the caches as one would."""

from __future__ import annotations

import asyncio
import random

import triton_distributed as trd
from triton_distributed.llm import Output, Request, packed
from triton_distributed.llm.contract.records import GENERATE
from triton_distributed.llm.engines.mock.engine import MockEngine
from triton_distributed.llm.router.model_router import ModelRouter
from triton_distributed.llm.routing.keys import block_keys
from triton_distributed.llm.routing.policies.kv import kv
from triton_distributed.llm.routing.router import Router
from triton_distributed.llm.routing.view import Question
from triton_distributed.llm.worker.serve import serve_model
from triton_distributed.testing import LocalNetwork, run_in_virtual_time


async def hit_rate(front_ends: int, conversations: int, turns: int, workers: int, blocks: int, seed: int = 3) -> float:
    """Conversations whose turns come to front ends by chance. Returns the part of the prompts that was cached."""
    chance = random.Random(seed)
    async with LocalNetwork() as network:
        engines = [MockEngine(speed="dynamo", blocks=blocks, answer_tokens=20) for _ in range(workers)]
        served = [await serve_model(await network.worker(), each) for each in engines]
        component = served[0].card.component
        endpoint = trd.Stream[Request, Output](f"models.{component}.{GENERATE}")
        routers = [ModelRouter(network, ("models", component), Router(kv, "kv")) for _ in range(front_ends)]

        async def turn(history: list[int]) -> None:
            router, prompt = chance.choice(routers), packed(history)
            placed = await router.place(Question(tokens=len(history), keys=block_keys(prompt, 64)))
            try:
                request = Request(prompt=prompt, max_tokens=20, router=router.id)
                async for output in network.stream(endpoint, request, policy=placed, idempotent=True):
                    placed.first_output(output.usage.cached_tokens if output.usage else None)
            finally:
                placed.release()

        async def conversation(number: int) -> None:
            await asyncio.sleep(chance.expovariate(1 / 20))
            history = [number] * chance.randrange(500, 6000)
            for _ in range(turns):
                await turn(history)
                await asyncio.sleep(chance.expovariate(1 / 5))
                history += [number + 7] * chance.randrange(100, 1500)

        async with asyncio.TaskGroup() as group:
            for number in range(conversations):
                group.create_task(conversation(number))
        states = [each for router in routers for each in router.states()]
        assert all((each.watched, each.waiting, each.running) == (True, 0, 0) for each in states)
        for router in routers:
            await router.close()
        metrics = [each.metrics() for each in engines]
        return sum(each.cached_tokens for each in metrics) / sum(each.prompt_tokens for each in metrics)


def test_two_front_ends_use_the_caches_as_well_as_one():
    one, two = (run_in_virtual_time(hit_rate(count, 40, 4, 4, 500)) for count in (1, 2))
    assert one > 0.4
    assert two >= 0.95 * one
