"""What a refused request is told: when there will be a place for it. In virtual time, against when there was one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from triton_distributed.config import Config
from triton_distributed.errors import Overloaded
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.testing import run_in_virtual_time

CONFIG = Config(discovery="memory", handle_signals=False, retries=0)
CLOSE_S = 0.002  # the hint has whole milliseconds


class Seen:
    """The refusals of one run, each with its time, and when its handlers ended, on the loop's clock."""

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self.refusals: list[tuple[float, Overloaded]] = []
        self.ends: list[float] = []

    def pairs(self, skip: int = 0) -> list[tuple[float, float]]:
        """The hint of each refusal, and how long it really took until there was a place for one more.

        Who is refused finds all places and the whole queue taken, and each end gives a place to one that waits.
        """
        found = []
        for when, error in self.refusals[skip:]:
            later = [each for each in self.ends if each > when]
            if len(later) > self.max_queue:
                found.append((error.retry_after_s, later[self.max_queue] - when))
        assert len(found) > 20
        return found


def serve(arrivals: Iterator[float], duration: Callable[[float], float], max_inflight: int, max_queue: int = 0) -> Seen:
    """Serve requests that come at these times, each of which takes so long where it begins."""
    seen = Seen(max_queue)
    began = 0.0

    async def handler(request: Any) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(duration(loop.time() - began))
        seen.ends.append(loop.time())

    async def call(client: Any) -> None:
        try:
            await client.call(None)
        except Overloaded as error:
            seen.refusals.append((asyncio.get_running_loop().time(), error))

    async def main() -> None:
        nonlocal began
        async with DistributedRuntime(config=CONFIG) as worker, DistributedRuntime(config=CONFIG) as caller:
            worker.endpoint("t.c.e").serve_endpoint(handler, max_inflight=max_inflight, max_queue=max_queue)
            client = await caller.endpoint("t.c.e").client()
            await client.wait_for_instances()
            loop = asyncio.get_running_loop()
            began = loop.time()
            calls = []
            for each in arrivals:
                await asyncio.sleep(began + each - loop.time())
                calls.append(asyncio.ensure_future(call(client)))
            await asyncio.gather(*calls)

    run_in_virtual_time(main())
    assert seen.refusals
    return seen


def evenly(count: int, seconds: float) -> Iterator[float]:
    return (n * seconds / count for n in range(count))


def bursts(size: int, period_s: float, count: int) -> Iterator[float]:
    """So many at once, and as many spread over the time until the next burst."""
    for n in range(count):
        yield from [n * period_s] * size
        yield from (n * period_s + 0.01 + each for each in evenly(size, period_s - 0.02))


@pytest.mark.parametrize("max_queue", [0, 3, 4, 9])
def test_bursts_of_equal_handlers(max_queue: int) -> None:
    """All places come free at the same time, which the mean of many handlers does not say."""
    rounds = 1 + max_queue / 4
    seen = serve(bursts(20, 2.0 * rounds + 0.5, 4), lambda at: 2.0, 4, max_queue)
    for hint_s, true_s in seen.pairs(skip=40):  # those of the first burst, of which nothing was known
        assert true_s - CLOSE_S <= hint_s <= max(true_s, (max_queue + 1) * 2.0 / 4) + CLOSE_S


@pytest.mark.parametrize("max_queue", [0, 5])
def test_handlers_that_end_one_after_the_other(max_queue: int) -> None:
    seen = serve(evenly(500, 20.0), lambda at: 1.0, 8, max_queue)
    for hint_s, true_s in seen.pairs(skip=20):
        assert true_s - CLOSE_S <= hint_s <= max(true_s, (max_queue + 1) / 8) + CLOSE_S


@pytest.mark.parametrize("max_queue", [0, 8])
def test_handlers_that_take_random_times(max_queue: int) -> None:
    """Nobody knows when a place comes free; on average the hint is right, as the mean alone would be."""
    rng = random.Random(1)
    seen = serve(evenly(1600, 80.0), lambda at: rng.expovariate(1.0), 8, max_queue)
    pairs = seen.pairs(skip=50)
    hints, trues = (sum(each) / len(pairs) for each in zip(*pairs, strict=True))
    assert hints == pytest.approx(trues, rel=0.25)


def test_where_nothing_has_ended_yet() -> None:
    """As long again as they have run; nothing where they have only just begun."""
    seen = serve(iter([0.0, 0.0, 0.0, 0.3, 1.0, 2.5]), lambda at: 5.0, 2)
    hints = [error.retry_after_s for _, error in seen.refusals]
    assert hints == pytest.approx([0.0, 0.3, 1.0, 2.5], abs=CLOSE_S)
    assert "try again" not in str(seen.refusals[0][1])
    assert "2 requests run, the oldest for 2.5 s, and 0 wait" in str(seen.refusals[-1][1])


def test_handlers_that_take_far_longer_than_they_took() -> None:
    """After a hundred that took 50 ms all places are taken for 2 s."""
    seen = serve(evenly(700, 7.0), lambda at: 0.05 if at < 5 else 2.0, 4)
    last = [(hint_s, true_s) for hint_s, true_s in seen.pairs() if true_s > 0.1]
    assert len(last) > 80
    assert sum(hint_s < 0.1 for hint_s, true_s in last) < 0.1 * len(last)
    for hint_s, true_s in last:
        assert hint_s + true_s == pytest.approx(2.0, abs=0.15) or hint_s == pytest.approx(2.0 - true_s, abs=0.15)
