"""Routers under faults in virtual time: workers die and come, callers leave, readers are slow. Nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import random
from array import array

import pytest

import triton_distributed as trd
from triton_distributed.llm import Engine, Model, ModelCard, Output, Request, Usage, packed
from triton_distributed.llm.contract.cache import BlocksRemoved, BlocksStored, CacheEvents
from triton_distributed.llm.contract.watching import WatchRequest, WatchUpdate, keys_of
from triton_distributed.llm.router.model_router import ModelRouter
from triton_distributed.llm.routing.keys import block_keys
from triton_distributed.llm.routing.policies.kv import kv
from triton_distributed.llm.routing.router import Router
from triton_distributed.llm.routing.view import Question
from triton_distributed.llm.worker import subscriber
from triton_distributed.llm.worker.serve import serve_model
from triton_distributed.testing import LocalConnection, LocalNetwork, run_in_virtual_time

CARD = ModelCard(name="m", kv_block_tokens=64)
SEEDS = 2


class Engineered(Engine):
    """Holds the last prompts, whole, and takes a while for each."""

    def __init__(self, chance: random.Random, fails: float = 0.0) -> None:
        self.model = Model(card=CARD, tokenizer="bytes")
        self.slots = 4
        self.held: dict[bytes, range] = {}
        self._chance, self._fails, self._names = chance, fails, 0

    def kv_events(self, publish):
        self._publish = publish
        return True

    async def generate(self, request):
        await asyncio.sleep(self._chance.uniform(0.01, 0.3))
        if self._chance.random() < self._fails:
            raise RuntimeError("the engine fails")
        known = self.held.pop(request.prompt, None)
        if known is None:
            count = len(request.prompt) // 256
            known = range(self._names, self._names + count)
            self._names += count
            stored = BlocksStored(hashes=list(known), parent=None, tokens=request.prompt, block_tokens=64)
            self._publish(CacheEvents([stored]))
        self.held[request.prompt] = known
        if len(self.held) > 6:
            gone = self.held.pop(next(iter(self.held)))
            self._publish(CacheEvents([BlocksRemoved(hashes=list(reversed(gone)))]))
        yield Output([1], usage=Usage(len(request.prompt) // 4, 1, 0))
        for _ in range(self._chance.randrange(4)):
            await asyncio.sleep(0.02)
            yield Output([1])
        yield Output(finish_reason="stop")


def prompts(count: int) -> list[bytes]:
    return [packed(array("I", [number]) * (64 * (2 + number % 9))) for number in range(count)]


async def ask(network: LocalConnection, router: ModelRouter, prompt: bytes, timeout: float) -> None:
    endpoint = trd.Stream[Request, Output](f"models.{Model(card=CARD, tokenizer='bytes').published.component}.generate")
    placed = await router.place(Question(tokens=len(prompt) // 4, keys=block_keys(prompt, 64)))
    try:
        request = Request(prompt=prompt, router=router.id)
        async for _ in network.stream(endpoint, request, policy=placed, timeout=timeout, idempotent=True):
            placed.first_output()
    finally:
        placed.release()


async def faults(seed: int) -> None:
    chance = random.Random(seed)
    async with LocalNetwork() as network:
        component = Model(card=CARD, tokenizer="bytes").published.component
        routers = [ModelRouter(network, ("models", component), Router(kv, "kv")) for _ in range(2)]
        fleet: list[tuple[LocalConnection, Engineered, int]] = []
        texts = prompts(40)
        outcomes: dict[str, int] = {}

        async def start() -> None:
            worker, engine = await network.worker(), Engineered(chance, 0.05)
            fleet.append((worker, engine, (await serve_model(worker, engine)).instance.id))

        async def caller() -> None:
            for _ in range(60):
                timeout = chance.choice((0.1, 5.0, 5.0, 5.0))
                try:
                    async with asyncio.timeout(timeout if timeout < 1 else None):
                        await ask(network, chance.choice(routers), chance.choice(texts), timeout)
                    outcome = "ok"
                except (trd.TritonError, TimeoutError) as error:
                    outcome = type(error).__name__
                outcomes[outcome] = outcomes.get(outcome, 0) + 1

        async def breaker() -> None:
            for _ in range(12):
                await asyncio.sleep(chance.uniform(0.1, 0.8))
                worker, _, _ = fleet.pop(chance.randrange(len(fleet)))
                await (worker.kill() if chance.random() < 0.6 else worker.close())
                await start()

        for _ in range(3):
            await start()
        async with asyncio.TaskGroup() as group:
            group.create_task(breaker())
            for _ in range(10):
                group.create_task(caller())
        assert outcomes["ok"] > 300
        assert len(outcomes) > 1
        await asyncio.sleep(10)
        for router in routers:
            states = router.states()
            assert {each.instance_id for each in states} == {id for _, _, id in fleet}
            assert all(
                (each.watched, each.mode, each.waiting, each.running) == (True, "exact", 0, 0) for each in states
            )
            assert not router.core.held
            assert not router._held
            for worker, known in router.core.workers.items():
                assert (known.work.wait_s, known.work.promised) == (0.0, {})
                engine = next(each for _, each, id in fleet if id == worker[0])
                for prompt in texts:
                    keys = block_keys(prompt, 64)
                    expected = len(keys) if prompt in engine.held else 0
                    assert router.core.index.walked_depths(keys).get(worker, 0) == expected
            held = {key for _, each, _ in fleet for prompt in each.held for key in block_keys(prompt, 64)}
            assert len(router.core.index) == len(held)
            await router.close()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_after_any_faults_the_router_knows_what_there_is_and_nothing_stays_booked(seed):
    run_in_virtual_time(faults(seed), seed=seed)


def test_a_router_that_reads_slowly_gets_a_new_snapshot_and_the_worker_keeps_little(monkeypatch):
    monkeypatch.setattr(subscriber, "LEAST_WAITING", 5000)

    async def program() -> None:
        async with LocalNetwork() as network:
            engine = Engineered(random.Random(1))
            worker = await network.worker()
            served = await serve_model(worker, engine)
            endpoint = trd.Stream[WatchRequest, WatchUpdate](f"models.{served.card.component}.watch")
            stream = network.stream(endpoint, WatchRequest(router=1))
            reading = aiter(stream)
            first = await anext(reading)
            assert (first.begins, first.more) == (True, False)
            held: set[int] = set()
            names = iter(range(10**9))
            lasting = [next(names) for _ in range(100)]
            tokens = packed(range(6400))
            engine._publish(CacheEvents([BlocksStored(hashes=lasting, parent=None, tokens=tokens, block_tokens=64)]))
            for number in range(400):
                some = [next(names) for _ in range(500)]
                tokens = packed(array("I", [number]) * 32_000)
                stored = BlocksStored(hashes=some, parent=None, tokens=tokens, block_tokens=64)
                engine._publish(CacheEvents([stored, BlocksRemoved(hashes=some[400:])]))
                engine._publish(CacheEvents([BlocksRemoved(hashes=list(reversed(some[:400])))]))
                await asyncio.sleep(0.01)  # In virtual time: the window of the stream fills.
            (waiting,) = served._watching._subscribers
            assert waiting._waiting < 5000 + 1000
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):  # Then all has come.
                    while True:
                        update = await anext(reading)
                        if update.begins:
                            held.clear()
                        for each in update.blocks:
                            change = held.update if each.change == "stored" else held.difference_update
                            change(keys_of(each.keys))
            assert waiting.snapshots > 1
            assert held == set(block_keys(packed(range(6400)), 64))
            stream.cancel()

    run_in_virtual_time(program())
