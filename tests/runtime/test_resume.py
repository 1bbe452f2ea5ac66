"""Streams that go on with another instance where one was lost: no item twice, none left out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest

from tests.runtime.cluster import Cluster, drained, into, patiently, until
from triton_distributed.errors import StreamIncomplete
from triton_distributed.routing.budget import LEAST, RetryBudget
from triton_distributed.runtime import Annotated, Context, DistributedRuntime


class Counter:
    """A handler that counts to `request`, and whose worker dies before it yields certain numbers."""

    def __init__(self, every: int = 1, dies_before: tuple[int, ...] = ()) -> None:
        self.every = every
        self.dies_before = list(dies_before)
        self.began: list[tuple[Any, str | None]] = []
        self.runtime: DistributedRuntime | None = None

    async def __call__(self, request: int, context: Context) -> AsyncIterator[int]:
        start = context.resume_token or 0
        self.began.append((context.resume_token, context.metadata.get("who")))
        for n in range(start, request):
            if self.dies_before and n >= self.dies_before[0]:
                self.dies_before.pop(0)
                await asyncio.sleep(0)  # what was yielded leaves
                await asyncio.sleep(0)
                self.die()
            if (n + 1) % self.every == 0:
                context.checkpoint(n + 1)
            yield n

    def die(self) -> None:
        assert self.runtime is not None
        for session in list(self.runtime.worker.server.sessions):
            session._transport.abort()  # type: ignore[union-attr]


async def counting(cluster: Cluster, *counters: Counter) -> Any:
    for counter in counters:

        async def handler(request: Any, context: Context, counter: Counter = counter) -> AsyncIterator[int]:
            async for item in counter(request, context):
                yield item

        counter.runtime = await cluster.worker(handler)
    client = await cluster.client()
    await until(lambda: len(client.instance_ids()) == len(counters))
    return client


@pytest.mark.any_loop
@pytest.mark.parametrize("every", [1, 7, 10_000])
async def test_one_sequence_across_lost_instances(cluster: Cluster, every: int) -> None:
    counters = [Counter(every, (50,)), Counter(every, (120,)), Counter(every)]
    client = await counting(cluster, *counters)
    for n in range(6):
        got = await patiently(drained(client.generate(200, annotated=False, resume=True, metadata={"who": "me"})))
        assert got == [*range(200)], n
    began = [each for counter in counters for each in counter.began]
    assert not any(counter.dies_before for counter in counters)
    assert {who for _, who in began} == {"me"}
    tokens = [token for token, _ in began if token is not None]
    assert all(token % every == 0 for token in tokens)
    assert bool(tokens) == (every < 50)


async def test_a_token_may_hold_a_small_array(cluster: Cluster) -> None:
    died: list[int] = []

    async def handler(request: int, context: Context) -> AsyncIterator[int]:
        begin = 0 if context.resume_token is None else int(context.resume_token["next"][0])
        for n in range(begin, request):
            if n == 3 and not died:
                died.append(n)
                await asyncio.sleep(0)  # what was yielded leaves
                await asyncio.sleep(0)
                for runtime in cluster.runtimes:
                    for session in list(runtime.worker.server.sessions):
                        session._transport.abort()  # type: ignore[union-attr]
            context.checkpoint({"next": np.array([n + 1])})
            yield n

    for _ in range(2):
        await cluster.worker(handler)
    client = await cluster.client()
    await until(lambda: len(client.instance_ids()) == 2)
    assert await patiently(drained(client.generate(6, annotated=False, resume=True))) == [*range(6)]
    assert died == [3]


@pytest.mark.any_loop
@pytest.mark.parametrize("raised", [asyncio.CancelledError("mine"), RuntimeError("mine")], ids=repr)
async def test_what_a_policy_raises_in_a_retry_ends_that_call_only(cluster: Cluster, raised: BaseException) -> None:
    counters = [Counter(1, (50,)), Counter(1)]
    client = await counting(cluster, *counters)
    assert counters[0].runtime is not None
    first = counters[0].runtime.instance_id

    def policy(request: Any, instances: Any, load: Any) -> Any:
        chosen = [each for each in instances if each.id == first]
        if not chosen:
            raise raised
        return chosen[0]

    async def endless(request: Any) -> AsyncIterator[int]:
        yield 0
        await asyncio.Event().wait()

    await cluster.serve(counters[0].runtime, endless, "t.c.endless")
    other = await cluster.client("t.c.endless")
    await other.wait_for_instances()
    others = [other.generate(1, annotated=False) for _ in range(2)]
    for each in others:
        assert await patiently(each.__anext__()) == 0
    with pytest.raises((asyncio.CancelledError, ValueError)):  # an error of a policy is a ValueError
        await patiently(drained(client.generate(200, annotated=False, resume=True, policy=policy)))
    for each in others:
        with pytest.raises(StreamIncomplete):
            await patiently(each.__anext__())
    assert client.stats.inflight == 0
    assert await patiently(drained(client.generate(5, annotated=False))) == [*range(5)]


async def test_without_resume_tokens_are_not_seen_and_the_break_is_told(cluster: Cluster) -> None:
    client = await counting(cluster, Counter(3, (50,)), Counter(3, (50,)))
    items: list[int] = []
    with pytest.raises(StreamIncomplete) as caught:
        await into(items, client.generate(200, annotated=False))
    assert items == [*range(50)]
    assert caught.value.items == 50


async def test_nobody_left_to_go_on(cluster: Cluster) -> None:
    client = await counting(cluster, Counter(1, (50,)))
    items: list[int] = []
    with pytest.raises(StreamIncomplete) as caught:
        await into(items, client.generate(200, annotated=False, resume=True))
    assert items == [*range(50)]
    assert caught.value.items == 50


async def test_a_request_that_kills_every_worker_ends(cluster: Cluster) -> None:
    counters = [Counter(1, (10,) * 50) for _ in range(3)]
    client = await counting(cluster, *counters)
    with pytest.raises(StreamIncomplete):
        await patiently(drained(client.generate(200, resume=True)))
    assert sum(len(each.began) for each in counters) <= 5


async def test_what_a_drain_cuts_goes_on_elsewhere() -> None:
    cluster = Cluster(drain_timeout_s=0.01)
    on = asyncio.Event()

    async def slow(request: int, context: Context) -> AsyncIterator[int]:
        for n in range(context.resume_token or 0, request):
            context.checkpoint(n + 1)
            yield n
            if n == 3 and context.resume_token is None:
                await on.wait()

    first = await cluster.worker(slow)
    client = await cluster.client()
    stream = aiter(client.generate(8, annotated=False, resume=True))
    assert [await patiently(anext(stream)) for _ in range(4)] == [0, 1, 2, 3]
    await cluster.worker(slow)
    await until(lambda: len(client.instance_ids()) == 2)
    await first.close()
    assert await patiently(_rest(stream)) == [4, 5, 6, 7]
    await cluster.close()


async def _rest(stream: Any) -> list[Any]:
    return [item async for item in stream]


async def test_items_of_every_kind_carry_tokens(cluster: Cluster) -> None:
    big = "x" * 200_000

    async def kinds(request: Any, context: Context) -> AsyncIterator[Any]:
        items = [
            1,
            None,
            Annotated("a", "e"),
            big,
            np.arange(100_000),
            Annotated(None, None, ["c"]),
            {"k": [1]},
        ]
        for n, item in enumerate(items):
            if n != 1:
                context.checkpoint({"at": n})
            yield item

    client = await cluster.connect(kinds)
    items = await patiently(drained(client.generate(1)))
    assert [each.event() for each in items] == [None, None, "e", None, None, None, None]
    assert items[0].data() == 1
    assert items[1].data() is None
    assert items[3].data() == big
    assert (items[4].data() == np.arange(100_000)).all()
    assert items[5].comments() == ["c"]
    assert items[6].data() == {"k": [1]}
    plain = await patiently(drained(client.generate(1, annotated=False, resume=True)))
    assert [type(each).__name__ for each in plain] == ["int", "str", "str", "ndarray", "dict"]


async def test_tokens_of_a_generator_in_a_thread_stay_with_their_items(cluster: Cluster) -> None:
    runtimes: list[DistributedRuntime] = []
    died: list[int] = []

    def handler(request: int, context: Context) -> Iterator[int]:
        for n in range(context.resume_token or 0, request):
            if n == 150 and not died:
                died.append(n)
                loop.call_soon_threadsafe(die)
            context.checkpoint(n + 1)
            yield n

    def die() -> None:
        for runtime in runtimes:
            for session in list(runtime.worker.server.sessions):
                session._transport.abort()  # type: ignore[union-attr]

    loop = asyncio.get_running_loop()
    runtimes += [await cluster.worker(handler), await cluster.worker(handler)]
    client = await cluster.client()
    await until(lambda: len(client.instance_ids()) == 2)
    got = await patiently(drained(client.generate(1000, annotated=False, resume=True)))
    assert died
    assert got == [*range(1000)]


async def test_tokens_that_cannot_travel_raise_in_the_handler(cluster: Cluster) -> None:
    async def handler(request: Any, context: Context) -> AsyncIterator[int]:
        context.checkpoint(object() if request else "x" * 100_000)
        yield 1

    client = await cluster.connect(handler)
    with pytest.raises(TypeError, match="token"):
        await patiently(drained(client.generate(1)))
    with pytest.raises(ValueError, match="at most 65,536 bytes"):
        await patiently(drained(client.generate(0)))


async def test_a_streamed_request_cannot_be_resumed(cluster: Cluster) -> None:
    async def requests() -> AsyncIterator[int]:
        yield 1

    client = await counting(cluster, Counter())
    with pytest.raises(ValueError, match="resume=True"):
        client.generate(requests(), resume=True)


async def test_a_context_without_a_request_takes_checkpoints() -> None:
    Context().checkpoint(1)


async def test_retries_never_multiply_an_outage(cluster: Cluster) -> None:
    """Every instance refuses every call: what is sent in all is bounded by the budget, not by calls times retries."""
    hold = asyncio.Event()

    async def handler(request: Any) -> None:
        await hold.wait()

    for _ in range(4):
        await cluster.worker(handler, max_inflight=1)
    client = await cluster.client()
    await until(lambda: len(client.instance_ids()) == 4)
    for each in client.instance_ids():
        client.direct(1, each)
    await until(lambda: sum(each.running for each in cluster.served()) == 4)
    calls = 1000
    for _ in range(calls):
        with pytest.raises(Exception, match="is overloaded"):
            await patiently(client.call(1))
    refused = sum(each.outcomes["refused"] for each in cluster.served())
    assert calls < refused <= 2 * calls  # and not four times: 100 saved up, a fifth of the calls, 10 a second
    hold.set()


def test_the_budget() -> None:
    budget = RetryBudget(0.0)
    assert sum(budget.take(0.0, 0, 0) for _ in range(1000)) == LEAST
    assert (
        sum(budget.take(0.0, 1000, 0) for _ in range(1000)) == LEAST
    )  # a fifth of them, and no more than may be saved
    assert sum(budget.take(1.0, 1000, 0) for _ in range(1000)) == 10
    assert sum(budget.take(1000.0, 1000, 500) for _ in range(1000)) == 500
