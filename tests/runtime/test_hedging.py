"""Hedged calls: two handlers where the first takes long, one answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, longer, patiently, until
from triton_distributed.errors import DeadlineExceeded
from triton_distributed.runtime import Client


class Worker:
    def __init__(self, name: str) -> None:
        self.name = name
        self.began = 0
        self.cancelled = asyncio.Event()
        self.go = asyncio.Event()
        self.error: Exception | None = None

    async def serve(self, request: Any) -> str:
        self.began += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self.error is not None:
            raise self.error
        return self.name


async def two(cluster: Cluster) -> tuple[Worker, Worker, Client]:
    """Two workers, of which the policy prefers the first."""
    one, other = Worker("one"), Worker("other")
    first = await cluster.worker(one.serve)
    await cluster.worker(other.serve)
    client = await cluster.client(
        policy=lambda request, all, load: next((each for each in all if each.id == first.instance_id), all[0])
    )
    await until(lambda: len(client.instance_ids()) == 2)
    return one, other, client


async def test_the_second_answers_and_the_first_is_cancelled(cluster: Cluster) -> None:
    one, other, client = await two(cluster)
    call = asyncio.ensure_future(client.call(1, idempotent=True, hedge_after_s=0.01))
    await until(lambda: one.began and other.began)
    other.go.set()
    assert await patiently(call) == "other"
    await patiently(one.cancelled.wait())
    assert (one.began, other.began) == (1, 1)


async def test_the_second_goes_elsewhere_while_the_first_is_still_being_sent(cluster: Cluster) -> None:
    _, other, client = await two(cluster)
    other.go.set()
    large = bytes(1 << 20)  # sent from a task, so that nothing has been written when the second is begun
    assert await patiently(client.call(large, idempotent=True, hedge_after_s=0.0)) == "other"
    assert other.began == 1


async def test_the_first_may_still_answer(cluster: Cluster) -> None:
    one, other, client = await two(cluster)
    call = asyncio.ensure_future(client.call(1, idempotent=True, hedge_after_s=0.01))
    await until(lambda: other.began)
    one.go.set()
    assert await patiently(call) == "one"
    await patiently(other.cancelled.wait())


async def test_one_that_answers_in_time_is_not_hedged(cluster: Cluster) -> None:
    one, other, client = await two(cluster)
    one.go.set()
    for _ in range(20):
        assert await patiently(client.call(1, idempotent=True, hedge_after_s=60)) == "one"
    assert other.began == 0


async def test_one_that_fails_is_waited_for_no_more_than_the_other(cluster: Cluster) -> None:
    one, other, client = await two(cluster)
    other.error = KeyError("other")
    other.go.set()
    call = asyncio.ensure_future(client.call(1, idempotent=True, hedge_after_s=0.01))
    await until(lambda: other.began)
    one.go.set()
    assert await patiently(call) == "one"
    one.error = ValueError("one")
    with pytest.raises(ValueError, match="one"):
        await patiently(client.call(1, idempotent=True, hedge_after_s=0.0))


async def test_a_deadline_holds_for_both_and_leaving_cancels_both(cluster: Cluster) -> None:
    one, other, client = await two(cluster)
    for limit_s in longer(0.1):
        with pytest.raises(DeadlineExceeded):
            await patiently(client.call(1, idempotent=True, hedge_after_s=0.01, timeout=limit_s))
        if one.began and other.began:
            break
        one.began = other.began = 0
    await patiently(one.cancelled.wait())
    await patiently(other.cancelled.wait())
    one.cancelled.clear()
    other.cancelled.clear()
    other.began = 1
    call = asyncio.ensure_future(client.call(1, idempotent=True, hedge_after_s=0.01))
    await until(lambda: other.began == 2)
    call.cancel()
    await patiently(one.cancelled.wait())
    await patiently(other.cancelled.wait())


async def test_only_what_is_idempotent_is_hedged(cluster: Cluster) -> None:
    _one, _other, client = await two(cluster)
    with pytest.raises(ValueError, match="idempotent=True"):
        await patiently(client.call(1, hedge_after_s=0.01))


@pytest.mark.parametrize("seconds", ["1", float("nan")])
async def test_the_time_before_the_second_is_a_number(cluster: Cluster, seconds: Any) -> None:
    _, _, client = await two(cluster)
    with pytest.raises(
        ValueError, match=r"hedge_after_s=.*: must be a number of seconds, or None for no second attempt"
    ):
        await client.call(1, idempotent=True, hedge_after_s=seconds)


async def test_the_second_instance_gets_what_was_passed_whatever_became_of_it(cluster: Cluster) -> None:
    seen: list[Any] = []
    go = asyncio.Event()

    async def handler(request: Any) -> str:
        seen.append(request)
        await go.wait()
        return "answer"

    for _ in range(2):
        await cluster.worker(handler)
    client = await cluster.client()
    await until(lambda: len(client.instance_ids()) == 2)
    request = {"tags": ["a"]}
    calling = asyncio.ensure_future(client.call(request, idempotent=True, hedge_after_s=0.05))
    await until(lambda: seen)
    request["tags"].append("b")
    await until(lambda: len(seen) == 2)
    go.set()
    assert await patiently(calling) == "answer"
    assert seen == [{"tags": ["a"]}] * 2


async def test_a_streamed_request_cannot_be_hedged(cluster: Cluster) -> None:
    async def requests() -> Any:
        yield 1

    _, _, client = await two(cluster)
    with pytest.raises(ValueError, match="a streamed request cannot be sent a second time"):
        await client.call(requests(), idempotent=True, hedge_after_s=0.01)
    assert client.stats.inflight == 0
