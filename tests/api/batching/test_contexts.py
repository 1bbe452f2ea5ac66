"""What a batch function sees: its variables, its context, its object; and the numbers of its batches."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

import pytest

from tests.api.batching.model import each, virtually
from triton_distributed.api.batching import batched
from triton_distributed.runtime import Context, current_context

variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)


@pytest.mark.parametrize("max_size", [2, 32], ids=["full", "after the delay"])
def test_the_variables_of_a_request_are_not_seen_by_the_batch(max_size):
    async def program() -> None:
        @batched(max_size=max_size)
        async def embed(requests: list[int]) -> list[int]:
            return [variable.get() for _ in requests]

        async def call(value: int) -> int:
            variable.set(value)
            return await embed(value)

        assert await each(call(1), call(2)) == [0, 0]

    virtually(program())


def test_a_batch_has_a_context_of_its_own():
    async def program() -> None:
        seen: list[Any] = []
        batches: list[Context] = []

        @batched()
        async def embed(requests: list[int], contexts: list[Context]) -> list[str]:
            mine = current_context()
            assert mine is not None
            batches.append(mine)
            seen.append((mine.id(), mine.deadline, mine.priority, dict(mine.metadata)))
            return [each.id() for each in contexts]

        def context(number: int, deadline: float | None) -> Context:
            made = Context(id=f"request-{number}", metadata={"user": number})
            made.deadline, made.priority = deadline, number
            return made

        now = asyncio.get_running_loop().time()
        ids = await each(*(embed(number, context(number, now + number)) for number in (7, 9, 8)))
        assert ids == ["request-7", "request-9", "request-8"]
        await each(embed(1, context(1, now + 5)), embed(2, context(2, None)))
        (first, *others), (second, *more) = seen
        assert first != second
        assert first.startswith("batch-")
        assert others == [now + 9, 9, {}]  # No caller's deadline cuts the others.
        assert more == [None, 2, {}]
        assert all(batch.over for batch in batches)  # Work that the function left running belongs to it no longer.

    virtually(program())


def test_the_travelling_values_that_all_requests_share_travel_on():
    async def program() -> None:
        @batched()
        async def embed(requests: list[int]) -> list[Any]:
            context = current_context()
            assert context is not None
            return [dict(context.travelling)] * len(requests)

        def sent(**values: Any) -> Context:
            return Context(travelling=values)

        one = sent(user=1, tenant="a", traceparent="00-1")
        assert await embed(1, one) == {"user": 1, "tenant": "a", "traceparent": "00-1"}
        assert (await each(embed(1, one), embed(2, sent(user=2, tenant="a"))))[0] == {"tenant": "a"}
        assert (await each(embed(1, one), embed(2)))[0] == {}

    virtually(program())


def test_a_plain_function_runs_in_a_thread_with_the_context_of_its_batch():
    async def program() -> None:
        @batched()
        def embed(requests: list[int]) -> list[str]:
            with pytest.raises(RuntimeError):
                asyncio.get_running_loop()
            mine = current_context()
            assert mine is not None
            return [mine.id() for _ in requests]

        first, second = await each(embed(1), embed(2))
        assert first == second
        assert first.startswith("batch-")

    virtually(program())


def test_objects_have_batches_of_their_own():
    class Service:
        def __init__(self, factor: int) -> None:
            self.factor = factor
            self.sizes: list[int] = []

        @batched
        async def embed(self, requests: list[int]) -> list[int]:
            self.sizes.append(len(requests))
            return [self.factor * each for each in requests]

    async def program() -> None:
        double, triple = Service(2), Service(3)
        answers = await each(*(service.embed(number) for number in (1, 2) for service in (double, triple)))
        assert answers == [2, 3, 4, 6]
        assert double.sizes == triple.sizes == [2]
        assert Service.embed.statistics().batches == 2

    virtually(program())


def test_the_function_stays_reachable_and_the_numbers_add_up():
    async def program() -> None:
        @batched(max_size=3)
        async def embed(requests: list[int]) -> list[int]:
            """Embed."""
            return requests

        assert await embed.function([1, 2]) == [1, 2]
        assert embed.__doc__ == "Embed."
        assert embed.statistics().mean_size == 0.0
        await each(*(embed(number) for number in range(4)))
        counts = embed.statistics()
        assert (counts.requests, counts.batches, counts.batched, counts.mean_size) == (4, 2, 4, 2.0)
        assert (counts.waiting, counts.running, counts.dropped, counts.rejected) == (0, 0, 0, 0)

    virtually(program())


def test_a_function_serves_one_loop_after_another():
    @batched
    async def embed(requests: list[int]) -> list[int]:
        return requests

    for number in range(2):
        assert virtually(embed(number)) == number
