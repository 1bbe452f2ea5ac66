"""Places by load only: what is chosen, booked, held, moved and released."""

from __future__ import annotations

import asyncio
import gc

import pytest

import triton_distributed as trd
from triton_distributed.errors import Overloaded
from triton_distributed.llm.router import model_router
from triton_distributed.llm.router.model_router import ModelRouter
from triton_distributed.llm.routing.policies.kv import kv
from triton_distributed.llm.routing.router import Router
from triton_distributed.llm.routing.view import Question

NAME = "models.tiny.generate"


def connect():
    return trd.connect(trd.Config(discovery="memory", handle_signals=False, watchdog_s=0))


async def echo(request):
    if request == "full":
        raise Overloaded("x", 1, "full")
    yield request


def router_of(here, **options):
    return ModelRouter(here, ("models", "tiny"), Router(kv, "kv"), **options)


def works(router):
    return [known.work for known in router.core.workers.values()]


def idle(router):
    return not router.core.held and all(
        (work.wait_s, work.running, work.promised) == (0.0, 0, {}) and not work.waiting for work in works(router)
    )


async def test_requests_spread_by_what_is_booked_and_nothing_is_left_of_them():
    async with connect() as one, connect() as two, connect() as here:
        ids = {(await each.serve(NAME, echo)).instance.id for each in (one, two)}
        router = router_of(here)
        first, second = [await router.place(Question(tokens=6000)) for _ in range(2)]
        assert {first.instance_id, second.instance_id} == ids
        stream = here.stream(NAME, "a", policy=second)
        assert [each async for each in stream] == ["a"]
        assert stream.instance_id == second.instance_id
        second.first_output(64)
        assert [state.running for state in router.states() if state.instance_id == second.instance_id] == [1]
        first.release()
        second.release()
        second.release()
        second.first_output()
        assert idle(router)
        dropped = await router.place(Question(tokens=6000))
        assert not idle(router)
        del dropped
        gc.collect()
        assert idle(router)
        await router.close()


async def test_a_request_that_its_worker_refuses_is_booked_elsewhere():
    async with connect() as one, connect() as two, connect() as here:
        started = asyncio.Event()

        async def busy(request):
            started.set()
            await asyncio.Event().wait()
            yield

        full = await one.serve(NAME, busy, max_inflight=1)
        other = await two.serve(NAME, echo)
        router = router_of(here)
        blocker = here.stream(NAME, "b", policy=lambda r, i, b: full.instance)
        await started.wait()
        held = await router.place(Question(tokens=10))
        while held.instance_id != full.instance.id:
            held = await router.place(Question(tokens=10))
        assert [each async for each in here.stream(NAME, "a", policy=held)] == ["a"]
        assert held.instance_id == held.booking.worker[0] == other.instance.id
        held.again(Question(tokens=12))
        assert idle(router)
        assert [each async for each in here.stream(NAME, "c", policy=held)] == ["c"]
        assert held.booking.tokens == 12
        held.release()
        assert [each async for each in here.stream(NAME, "c", policy=held)] == ["c"]
        assert idle(router)
        blocker.cancel()
        await router.close()


async def test_requests_are_held_until_a_worker_has_room_and_a_cancelled_one_is_withdrawn(monkeypatch):
    async with connect() as one, connect() as here:
        served = await one.serve(NAME, echo)
        router = router_of(here)
        first = await router.place(Question(tokens=100_000))
        held = [asyncio.ensure_future(router.place(Question(tokens=100_000))) for _ in range(3)]
        await asyncio.sleep(0)
        assert router.core.held == 3
        monkeypatch.setattr(model_router, "MAX_HELD", 3)
        with pytest.raises(Overloaded, match="3 requests wait"):
            await router.place(Question(tokens=10))
        held[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await held[0]
        assert router.core.held == 2
        first.first_output()
        second = await held[1]
        assert second.decision.held_s >= 0
        assert second.instance_id == served.instance.id
        assert not held[2].done()
        second.release()
        third = await held[2]
        third.release()
        first.release()
        assert idle(router)
        waiting = await router.place(Question(tokens=100_000))
        cut = asyncio.ensure_future(router.place(Question(tokens=100_000)))
        await asyncio.sleep(0)
        await router.close()
        with pytest.raises(asyncio.CancelledError):
            await cut
        waiting.release()
        assert idle(router)


async def test_workers_come_and_go_and_without_one_the_call_chooses():
    async with connect() as here:
        router = router_of(here)
        early = await router.place(Question(tokens=10))
        assert early.booking is early.decision is None
        stream = here.stream(NAME, "a", policy=early, timeout=10)
        async with connect() as one:
            served = await one.serve(NAME, echo)
            assert [each async for each in stream] == ["a"]
            assert early.instance_id == served.instance.id
            assert not idle(router)
            early.release()
            assert router.explain(Question(tokens=10)).chosen.worker == (served.instance.id, 0)
            assert idle(router)
        async with asyncio.timeout(10):
            while router.explain(Question(tokens=10)) is not None:
                await asyncio.sleep(0)
        assert not router.core.workers
        await router.close()
