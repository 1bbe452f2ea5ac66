"""A router follows workers: their caches, the requests of others, and what happens when a stream breaks."""

from __future__ import annotations

import asyncio

import triton_distributed as trd
from triton_distributed.llm import Engine, EngineMetrics, Model, ModelCard, Models, Output, Request, Usage, packed
from triton_distributed.llm.contract.cache import BlocksRemoved, BlocksStored, CacheCleared, CacheEvents
from triton_distributed.llm.contract.watching import Blocks, WatchRequest, WatchUpdate
from triton_distributed.llm.router import feed as feeds
from triton_distributed.llm.router.model_router import ModelRouter
from triton_distributed.llm.routing.keys import block_keys
from triton_distributed.llm.routing.policies.kv import kv
from triton_distributed.llm.routing.router import Router
from triton_distributed.llm.routing.view import Question
from triton_distributed.llm.worker import subscriber
from triton_distributed.llm.worker import watch as watch_module
from triton_distributed.llm.worker.serve import serve_model


class Cached(Engine):
    """Answers with one token for each release of `gate`, and reports blocks when a test says so."""

    def __init__(self, reports=True, cached=0, **card):
        card = {"name": "m", "kv_block_tokens": 64, **card}
        self.model = Model(card=ModelCard(**card), tokenizer="bytes")
        self.slots = 8
        self.reports, self.cached = reports, cached
        self.gate = asyncio.Semaphore(0)
        self.used = 0
        self.names = iter(range(1, 10**9))

    def kv_events(self, publish):
        self.publish = publish
        return self.reports

    async def generate(self, request):
        await self.gate.acquire()
        yield Output([1], usage=Usage(len(request.prompt) // 4, 1, self.cached))
        await self.gate.acquire()
        yield Output([1], finish_reason="length")

    def metrics(self):
        return EngineMetrics(kv_blocks_used=self.used, kv_blocks_total=100, kv_block_tokens=64)

    def store(self, tokens, rank=0):
        names = [next(self.names) for _ in range(len(tokens) // 64)]
        prompt = packed(tokens[: 64 * len(names)])
        self.publish(CacheEvents([BlocksStored(hashes=names, parent=None, tokens=prompt, block_tokens=64)], rank=rank))
        return names


def connect():
    return trd.connect(trd.Config(discovery="memory", handle_signals=False, watchdog_s=0))


def router_of(here, card, **options):
    return ModelRouter(here, ("models", card.component), Router(kv, "kv"), **options)


def prompt(blocks, first=0):
    return list(range(first, first + 64 * blocks))


def question(tokens):
    return Question(tokens=len(tokens), keys=block_keys(packed(tokens), 64))


def cached(router, tokens):
    """The tokens that each worker is known to hold."""
    decision = router.explain(question(tokens))
    return {each.worker: each.cached_tokens for each in decision.candidates} if decision else {}


async def until(check, seconds=20):
    async with asyncio.timeout(seconds):
        while not check():
            await asyncio.sleep(0.001)


def watched(router, count=1):
    return sum(each.watched for each in router.states()) == count


async def test_a_router_learns_what_workers_hold_and_sends_requests_there():
    one, two = Cached(), Cached()
    async with connect() as first, connect() as second, connect() as here:
        served = [await serve_model(at, engine) for at, engine in ((first, one), (second, two))]
        a, b = ((each.instance.id, 0) for each in served)
        one.store(prompt(100))  # Before a router is there.
        router = router_of(here, served[0].card)
        await until(lambda: watched(router, 2))
        assert cached(router, [*prompt(100), 7]) == {a: 6400, b: 0}
        names = two.store(prompt(50, first=9))
        await until(lambda: cached(router, [*prompt(50, first=9), 7]) == {a: 0, b: 3200})
        assert (await router.place(question(prompt(50, first=9)))).instance_id == b[0]
        two.publish(CacheEvents([BlocksRemoved(hashes=names[20:])]))
        await until(lambda: cached(router, prompt(50, first=9)) == {a: 0, b: 1280})
        one.publish(CacheEvents([CacheCleared()]))
        one.store(prompt(3, first=5))
        await until(lambda: cached(router, [*prompt(3, first=5), 7]) == {a: 192, b: 0})
        assert cached(router, prompt(100)) == {a: 0, b: 0}
        one.store(prompt(2, first=7), rank=1)
        await until(lambda: cached(router, [*prompt(2, first=7), 7]) == {a: 0, (a[0], 1): 128, b: 0})
        placed = await router.place(question(prompt(2, first=7)))
        assert (placed.instance_id, placed.rank) == (a[0], 1)
        assert {each.mode for each in router.states() if each.rank == 0} == {"exact"}
        await second.close()
        await until(lambda: b not in router.core.workers)
        later = router_of(here, served[0].card)
        await later.until_whole(20)
        assert watched(later, 2)
        assert cached(later, [*prompt(3, first=5), 7]) == {a: 192, (a[0], 1): 0}
        await router.close()
        await later.close()
        await router.close()


async def test_a_front_end_knows_the_caches_before_its_first_request():
    engine = Cached()
    async with connect() as worker, connect() as here:
        served = await serve_model(worker, engine)
        engine.store(prompt(10))
        async with Models(here) as models:
            await models.until_loaded(20)
            routed = models.get("m").routed
            assert routed is not None
            assert watched(routed.router)
            assert cached(routed.router, [*prompt(10), 7]) == {(served.instance.id, 0): 640}


async def test_a_request_of_another_router_whose_prompt_comes_from_elsewhere_needs_no_prefill():
    engine = Cached(role="decode")
    async with connect() as worker, connect() as here, connect() as there:
        served = await serve_model(worker, engine)
        mine = router_of(here, served.card)
        await until(lambda: watched(mine))
        assert mine.takers == {served.instance.id}
        contract = trd.Stream[Request, Output](f"models.{served.card.component}.generate")
        asked = Request(prompt=packed(prompt(200)), router=7, kv_transfer={"at": "a prefill worker"})
        stream = there.stream(contract, asked)
        await until(lambda: mine.states()[0].running == 1)
        assert (mine.states()[0].waiting, mine.states()[0].wait_s) == (0, 0.0)
        assert mine.explain(question(prompt(200))).chosen.promised_tokens == 0
        for _ in range(2):
            engine.gate.release()
        assert [each.token_ids async for each in stream] == [[1], [1]]
        await until(lambda: mine.states()[0].running == 0)
        (known,) = mine.core.workers.values()
        assert known.speed.measured == 0
        await mine.close()


async def test_the_requests_of_other_routers_are_booked_until_they_end():
    engine = Cached()
    async with connect() as worker, connect() as here, connect() as there:
        served = await serve_model(worker, engine)
        mine, other = router_of(here, served.card), router_of(there, served.card)
        await until(lambda: watched(mine) and watched(other))
        name = f"models.{served.card.component}.generate"
        asked = prompt(200)
        stream = there.stream(
            trd.Stream[Request, Output](name), Request(prompt=packed(asked), router=other.id), idempotent=True
        )
        await until(lambda: mine.states()[0].waiting == 1)
        assert mine.states()[0].wait_s > 0.1
        candidate = mine.explain(question(asked)).chosen
        assert (candidate.cached_tokens, candidate.promised_tokens) == (0, 200 * 64 - 1)
        assert other.states()[0].waiting == 0  # Its own request is not told: it has booked it.
        late = router_of(here, served.card)
        await until(lambda: watched(late))
        assert late.states()[0].waiting == 1
        engine.gate.release()
        await until(lambda: mine.states()[0].running == late.states()[0].running == 1)
        assert mine.states()[0].waiting == 0
        stream.cancel()
        await until(lambda: mine.states()[0].running == late.states()[0].running == 0)
        for each in (mine, other, late):
            assert not each.core.workers[served.instance.id, 0].work.promised
            await each.close()


async def test_a_stream_that_breaks_is_opened_again_and_what_is_old_is_forgotten(monkeypatch):
    monkeypatch.setattr(feeds, "RETRY_S", (0.001, 0.01))
    engine = Cached()
    async with connect() as worker, connect() as here:
        served = await serve_model(worker, engine)
        worker_id = (served.instance.id, 0)
        router = router_of(here, served.card)
        names = engine.store(prompt(10))
        await until(lambda: cached(router, [*prompt(10), 7]) == {worker_id: 640})
        watching = served._watching
        request = Request(prompt=packed(prompt(3)))
        stream = here.stream(trd.Stream[Request, Output](f"models.{served.card.component}.generate"), request)
        await until(lambda: router.states()[0].waiting == 1)

        def broken(*_):
            raise RuntimeError("no")

        # The stream fails, and fails again for some time. Then the router learns what has changed meanwhile.
        with monkeypatch.context() as patched:
            patched.setattr(subscriber.Subscriber, "take", broken)
            engine.publish(CacheEvents([BlocksRemoved(hashes=names[5:])]))
            await until(lambda: router.states()[0].mode == "off")
            assert not router.states()[0].watched
            assert cached(router, prompt(10)) == {worker_id: 0}
            assert router.states()[0].waiting == 0
            placed = await router.place(question(prompt(10)))
            assert placed.instance_id == served.instance.id
            placed.release()
        await until(lambda: watched(router))
        assert cached(router, prompt(10)) == {worker_id: 320}
        assert (router.states()[0].mode, router.states()[0].waiting) == ("exact", 1)
        await until(lambda: not router.core.index.sweep())
        assert len(router.core.index) == 5
        assert watching.watchers == 1
        stream.cancel()
        await router.close()
        await until(lambda: not watching.watchers)


async def test_a_worker_that_dies_in_the_snapshot_leaves_nothing():
    engine = Cached()
    async with connect() as here:
        async with connect() as worker:
            served = await serve_model(worker, engine)
            keys = range(20_000)
            engine.publish(
                CacheEvents(
                    [BlocksStored(hashes=list(keys), parent=None, tokens=packed(range(1_280_000)), block_tokens=64)]
                )
            )
            router = router_of(here, served.card)
            await until(lambda: len(router.core.index) > 0)
            assert not router.states()[0].watched
        await until(lambda: not router.core.workers and not router._ending)
        await until(lambda: not router.core.index.sweep())
        assert len(router.core.index) == 0
        await router.close()


async def test_a_worker_without_the_endpoint_is_routed_by_load(monkeypatch):
    async with connect() as worker, connect() as here:
        card = ModelCard(name="old")

        async def generate(request):
            yield request

        served = await worker.serve(f"models.{card.component}.generate", generate)
        router = router_of(here, card)
        placed = await router.place(question(prompt(10)))
        assert placed.instance_id == served.instance.id
        assert router.states()[0].mode == "off"
        placed.release()
        await router.close()


async def test_a_worker_that_sends_nonsense_is_routed_by_load_and_asked_again(monkeypatch):
    monkeypatch.setattr(feeds, "RETRY_S", (0.001, 0.01))
    async with connect() as worker, connect() as here:
        place = f"models.{ModelCard(name='odd').component}"
        good = asyncio.Event()
        opened = 0

        async def watch(request):
            nonlocal opened
            opened += 1
            keys = bytes(8) if good.is_set() else b"odd"
            yield WatchUpdate(begins=True, mode="exact", blocks=[Blocks(0, "stored", keys)])
            await asyncio.Event().wait()

        async def generate(request):
            yield request

        await worker.serve(trd.Stream[WatchRequest, WatchUpdate](f"{place}.watch"), watch)
        await worker.serve(f"{place}.generate", generate)
        router = router_of(here, ModelCard(name="odd"))
        await until(lambda: opened > 4 and router.states()[0].mode == "off")
        (await router.place(question(prompt(10)))).release()
        good.set()
        await until(lambda: watched(router))
        assert (router.states()[0].mode, len(router.core.index)) == ("exact", 1)
        await router.close()


async def test_other_blocks_than_the_routers_are_not_used(caplog):
    engine = Cached(kv_block_tokens=128)
    async with connect() as worker, connect() as here:
        served = await serve_model(worker, engine)
        router = router_of(here, served.card, block_tokens=64)
        engine.store(prompt(10))
        await until(lambda: watched(router))
        assert router.states()[0].mode == "off"
        assert len(router.core.index) == 0
        assert "routed by load only" in caplog.text
        await router.close()


async def test_an_engine_without_events_is_followed_by_its_requests():
    engine = Cached(reports=False, cached=128)
    async with connect() as worker, connect() as here:
        served = await serve_model(worker, engine)
        router = router_of(here, served.card)
        await until(lambda: watched(router))
        assert router.states()[0].mode == "approximate"
        endpoint = trd.Stream[Request, Output](f"models.{served.card.component}.generate")
        request = Request(prompt=packed(prompt(10)))
        for _ in range(4):
            engine.gate.release()
        assert len([each async for each in here.stream(endpoint, request)]) == 2
        worker_id = (served.instance.id, 0)
        await until(lambda: cached(router, [*prompt(10), 7]) == {worker_id: 640})
        # The engine tells that only two blocks were there.
        assert len([each async for each in here.stream(endpoint, request)]) == 2
        watching = served._watching
        assert (watching.asked, watching.measured) == (1280, 256)
        assert watching.believed == 9 * 64
        engine.used = 40
        await until(lambda: router.states()[0].kv_used == 0.4)
        other = Request(prompt=packed(prompt(10)), cache_salt="s")
        stream = here.stream(endpoint, other)
        await until(lambda: len(watching.entries) == 1)
        assert block_keys(other.prompt, 64)[0] not in watching.entries[max(watching.entries)].keys
        stream.cancel()
        await router.close()


async def test_an_engine_that_should_report_and_does_not_is_named(monkeypatch, caplog):
    monkeypatch.setattr(watch_module, "SILENT_S", 0.01)
    engine = Cached()
    config = trd.Config(discovery="memory", handle_signals=False, watchdog_s=0, status_port=0)
    async with trd.connect(config) as worker, connect() as here:
        served = await serve_model(worker, engine)
        router = router_of(here, served.card)
        endpoint = trd.Stream[Request, Output](f"models.{served.card.component}.generate")
        await until(lambda: watched(router))

        async def ask(**fields):
            engine.gate.release()
            engine.gate.release()
            assert len([each async for each in here.stream(endpoint, Request(**fields))]) == 2

        engine.cached = 640
        await ask(prompt=packed(prompt(10)))  # All of it was cached.
        assert served._watching._silence is None
        engine.cached = 0
        await ask(prompt=packed(prompt(10)))
        await until(lambda: router.states()[0].silent)
        assert router.states()[0].mode == "approximate"
        assert "should report its KV cache and does not" in caplog.text
        assert any("should report" in each for each in await worker.runtime.status_port.problems())
        page = await asyncio.to_thread(worker.metrics.text)
        assert 'triton_llm_kv_silent{model="m"} 1.0' in page
        await ask(prompt=packed(prompt(10, first=3)))
        await until(lambda: cached(router, prompt(10, first=3)) == {(served.instance.id, 0): 639})
        engine.store(prompt(10, first=5))
        await until(lambda: not router.states()[0].silent and watched(router))
        assert router.states()[0].mode == "exact"
        assert cached(router, [*prompt(10, first=5), 7]) == {(served.instance.id, 0): 640}
        assert cached(router, prompt(10, first=3)) == {(served.instance.id, 0): 0}
        assert not await worker.runtime.status_port.problems()
        await router.close()
