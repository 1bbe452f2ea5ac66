"""Virtual time: what waits takes no time, what can never happen is told, what is outside is refused."""

from __future__ import annotations

import asyncio
import contextvars
import random
import threading
import time
from collections.abc import Iterator

import pytest

import triton_distributed as trd
from tests.timing import MS, PATIENCE_S
from triton_distributed.config import Config
from triton_distributed.errors import DeadlineExceeded
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.testing import Deadlock, Livelock, VirtualTimeLoop, run_in_virtual_time, virtual_time

CONFIG = Config(discovery="memory", handle_signals=False, watchdog_s=0)


def test_an_hour_takes_a_moment_and_timers_keep_their_order():
    async def main():
        loop = asyncio.get_running_loop()
        order: list[int] = []
        began = loop.time()
        for seconds in (3, 1, 2):
            loop.call_later(seconds * 1000, order.append, seconds)
        loop.call_soon(order.append, 0)
        await asyncio.sleep(3600)
        return order, loop.time() - began

    began = time.monotonic()
    assert run_in_virtual_time(main()) == ([0, 1, 2, 3], pytest.approx(3600))
    assert time.monotonic() - began < PATIENCE_S


def test_timeouts_end_what_they_should():
    async def main():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10):
                await asyncio.get_running_loop().create_future()
        return await asyncio.wait_for(asyncio.sleep(9, "in time"), 10)

    assert run_in_virtual_time(main()) == "in time"


def test_a_deadlock_names_the_tasks_and_where_they_wait():
    async def waits_for_nobody():
        await asyncio.Event().wait()

    async def main():
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(waits_for_nobody(), name="the one")

    with pytest.raises(Deadlock) as caught:
        run_in_virtual_time(main())
    assert "the one" in [name for name, _ in caught.value.waiting]
    assert "2 task(s) wait" in str(caught.value)
    assert "the one at " in str(caught.value)


def test_a_circle_in_which_no_time_passes_is_told(monkeypatch):
    monkeypatch.setattr(virtual_time, "MOST_TURNS", 1000)

    async def main():
        while True:
            await asyncio.sleep(0)

    with pytest.raises(Livelock, match="1,001 times"):
        run_in_virtual_time(main())


def test_time_stands_while_a_thread_of_the_loop_works():
    def work() -> str:
        time.sleep(20 * MS)
        return "done"

    async def main():
        loop = asyncio.get_running_loop()
        began = loop.time()
        tick = loop.call_later(5, lambda: None)
        answer = await asyncio.to_thread(work)
        assert not tick.cancelled()
        return answer, loop.time() - began

    assert run_in_virtual_time(main()) == ("done", 0.0)


def test_a_thread_that_the_loop_does_not_know_is_refused():
    async def main():
        loop = asyncio.get_running_loop()
        thread = threading.Thread(target=loop.call_soon_threadsafe, args=(list,))
        thread.start()
        thread.join()
        while True:
            await asyncio.sleep(1)

    with pytest.raises(RuntimeError, match="an unknown thread called the loop"):
        run_in_virtual_time(main())


async def served(handler, use, **options):
    """Serve a handler in virtual time and let `use` call it."""
    async with trd.connect(CONFIG) as worker, trd.connect(CONFIG) as caller:
        await worker.serve("a.b.c", handler, **options)
        return await use(caller)


def test_a_plain_handler_runs_on_the_loop():
    def double(request: int, context: trd.Context) -> int:
        assert threading.current_thread() is threading.main_thread()
        assert context.remaining_s() == pytest.approx(600)
        return 2 * request

    assert run_in_virtual_time(served(double, lambda here: here.call("a.b.c", 21, timeout=600))) == 42


def test_a_plain_generator_makes_an_item_when_the_caller_takes_it():
    made = []

    def count(request: int) -> Iterator[int]:
        for number in range(request):
            made.append((number, asyncio.get_running_loop().time()))
            yield number

    async def use(here):
        items = []
        async for item in here.stream("a.b.c", 4):
            items.append(item)
        return items

    assert run_in_virtual_time(served(count, use)) == [0, 1, 2, 3]
    assert [number for number, _ in made] == [0, 1, 2, 3]


def test_a_plain_generator_is_closed_when_its_caller_leaves():
    steps = []

    def endless(request):
        try:
            while True:
                steps.append("item")
                yield b"x" * 1_000_000
        finally:
            steps.append("closed")

    async def use(here):
        async with here.stream("a.b.c", None) as items:
            async for _ in items:
                await asyncio.sleep(60)
                break
        await asyncio.sleep(60)
        return steps[-1]

    assert run_in_virtual_time(served(endless, use)) == "closed"
    assert len(steps) < 100


@pytest.mark.parametrize("kind", ["function", "generator"])
def test_an_error_of_a_plain_handler_reaches_its_caller(kind):
    def function(request):
        raise KeyError("missing")

    def generator(request):
        yield 1
        raise KeyError("missing")

    async def use(here):
        items = []
        with pytest.raises(KeyError):
            async for item in here.stream("a.b.c", None):
                items.append(item)
        return items

    assert run_in_virtual_time(served(locals()[kind], use)) == ([1] if kind == "generator" else [])


def test_an_item_that_does_not_fit_ends_a_plain_generator():
    ended = []

    def wrong(request: None) -> Iterator[int]:
        try:
            yield 1
            yield "two"  # type: ignore[misc]
        finally:
            ended.append(True)

    async def use(here):
        with pytest.raises(trd.RemoteError, match="int"):
            async for _ in here.stream("a.b.c", None):
                pass

    run_in_virtual_time(served(wrong, use))
    assert ended


def test_a_plain_function_may_return_an_awaitable_and_its_variables_last():
    variable = contextvars.ContextVar("variable", default="outside")

    def later(request):
        variable.set("inside")

        async def answer():
            await asyncio.sleep(300)
            return variable.get()

        return answer()

    assert run_in_virtual_time(served(later, lambda here: here.call("a.b.c", None))) == "inside"


def test_a_plain_batched_handler_runs_on_the_loop():
    @trd.batched(max_size=4, max_wait_s=60)
    def double(requests: list[int]) -> list[int]:
        return [2 * each for each in requests]

    async def use(here):
        return await asyncio.gather(*(here.call("a.b.c", each) for each in range(6)))

    assert run_in_virtual_time(served(double, use)) == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize(
    "what",
    [
        lambda loop: asyncio.open_connection("127.0.0.1", 1),
        lambda loop: asyncio.start_server(print, "127.0.0.1", 0),
        lambda loop: asyncio.create_subprocess_exec("true"),
        lambda loop: asyncio.to_thread(loop.add_reader, 0, print),
        lambda loop: asyncio.to_thread(loop.add_signal_handler, 15, print),
    ],
)
def test_the_world_outside_is_refused(what):
    async def main():
        await what(asyncio.get_running_loop())

    with pytest.raises(NotImplementedError, match='discovery="memory"'):
        run_in_virtual_time(main())


def test_a_seed_gives_the_same_program_and_leaves_the_module_random_as_it_was():
    async def main():
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        runtime = DistributedRuntime(config=CONFIG)
        await runtime.close()
        return runtime.instance_id, random.random(), loop.rng.random()

    random.seed(99)
    state = random.getstate()
    assert (
        run_in_virtual_time(main(), seed=1)
        == run_in_virtual_time(main(), seed=1)
        != run_in_virtual_time(main(), seed=2)
    )
    assert random.getstate() == state


def test_runtimes_on_other_loops_are_not_seeded():
    async def main():
        runtime = DistributedRuntime(config=CONFIG)
        await runtime.close()
        return runtime.instance_id

    random.seed(5)
    one = asyncio.run(main())
    random.seed(5)
    assert asyncio.run(main()) != one


def test_a_program_with_workers_runs_in_virtual_time():
    async def count(request):
        for number in range(request):
            await asyncio.sleep(60)
            yield number

    async def main():
        async with DistributedRuntime(config=CONFIG) as worker, DistributedRuntime(config=CONFIG) as caller:
            worker.endpoint("a.b.c").serve_endpoint(count)
            client = await caller.endpoint("a.b.c").client()
            await client.wait_for_instances()
            with pytest.raises(DeadlineExceeded):
                async for _ in client.generate(100, timeout=600.5):
                    pass
            return [item async for item in client.generate(10, annotated=False)]

    assert run_in_virtual_time(main()) == [*range(10)]


def test_what_main_raises_is_raised_and_what_it_leaves_is_cancelled():
    ended: list[str] = []

    async def goes_on():
        try:
            await asyncio.sleep(1e6)
        finally:
            ended.append("cancelled")

    async def main():
        task = asyncio.create_task(goes_on())
        await asyncio.sleep(1)
        raise LookupError(task.get_name())

    with pytest.raises(LookupError):
        run_in_virtual_time(main())
    assert ended == ["cancelled"]
