"""Batches of direct calls, without a worker: their times, their answers, their errors, and callers that leave."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

import pytest

from tests.api.batching.model import Model, each, later, prioritized, virtually
from triton_distributed.api.batching import QueuePolicy, batched
from triton_distributed.errors import DeadlineExceeded, InvalidRequest, Overloaded
from triton_distributed.runtime import Context, current_context


def test_requests_of_the_delay_share_a_batch_and_get_their_own_answers():
    async def program() -> None:
        embed = batched(max_wait_s=2.0)(model := Model())
        answers = await each(*(later(number * 0.5, embed(number)) for number in range(5)))
        assert answers == [0, -1, -2, -3, -4]
        # The last one comes together with the start of the batch, as its batch is formed.
        assert model.batches[0][0] == 2.0
        assert model.batches[0][1][:4] == [0, 1, 2, 3]

    virtually(program())


def test_a_full_batch_does_not_wait():
    async def program() -> None:
        embed = batched(max_size=3, max_wait_s=9.0)(model := Model())
        await each(*(embed(number) for number in range(3)))
        assert model.batches == [(0.0, [0, 1, 2])]

    virtually(program())


def test_without_a_delay_a_batch_has_what_has_come_in_this_turn():
    async def program() -> None:
        embed = batched(max_wait_s=0)(model := Model())
        await each(*(embed(number) for number in range(3)))
        assert model.batches == [(0.0, [0, 1, 2])]

    virtually(program())


def test_a_preferred_size_does_not_wait():
    async def program() -> None:
        embed = batched(max_size=8, max_wait_s=9.0, preferred_sizes=[2])(model := Model())
        await each(*(embed(number) for number in range(3)))
        assert model.batches == [(0.0, [0, 1]), (9.0, [2])]

    virtually(program())


def test_one_batch_runs_at_a_time_and_the_next_gathers_meanwhile():
    async def program() -> None:
        embed = batched(max_size=4, max_wait_s=0.5)(model := Model(takes_s=3.0))
        await each(*(later(number * 0.1, embed(number)) for number in range(7)))
        assert model.batches == [(0.3, [0, 1, 2, 3]), (3.3, [4, 5, 6])]

    virtually(program())


def test_as_many_batches_run_as_allowed():
    async def program() -> None:
        embed = batched(max_size=2, max_batches=2)(model := Model())
        await each(*(embed(number) for number in range(6)))
        assert [at for at, _ in model.batches] == [0.0, 0.0, 1.0]

    virtually(program())


def test_larger_priorities_overtake():
    async def program() -> None:
        embed = batched(max_size=2, max_wait_s=0)(model := Model())
        first = [embed(number) for number in range(2)]
        rest = [embed(number, prioritized(number)) for number in (2, 5, 3, 4)]
        await each(*first, *rest)
        assert [requests for _, requests in model.batches] == [[0, 1], [5, 4], [3, 2]]

    virtually(program())


def test_a_function_may_give_the_priority():
    async def program() -> None:
        embed = batched(max_size=1, max_wait_s=0, priority=lambda request, context: request)(model := Model())
        await each(*(embed(number, prioritized(-number)) for number in (9, 1, 2, 3)))
        assert [requests for _, requests in model.batches] == [[9], [3], [2], [1]]
        wrong = batched(priority=lambda request, context: "high")(model)  # type: ignore[arg-type, return-value]
        with pytest.raises(TypeError, match="priority= of .*Model.* returned 'high': must be an int"):
            await wrong(1)

    virtually(program())


def test_answers_leave_in_the_order_of_the_requests_with_keep_order():
    async def program() -> None:
        @batched(max_size=1, max_batches=3, keep_order=True)
        async def wait(requests: list[float]) -> list[float]:
            await asyncio.sleep(requests[0])
            return requests

        ended: list[float] = []

        async def call(request: float) -> None:
            ended.append(await wait(request, prioritized(int(request))))

        await each(*(call(request) for request in (3.0, 1.0, 2.0)))
        assert ended == [3.0, 1.0, 2.0]

    virtually(program())


# ---- callers that leave -----------------------------------------------------------------------------------------


def test_a_caller_that_leaves_before_the_batch_is_not_in_it():
    async def program() -> None:
        embed = batched(max_wait_s=1.0)(model := Model())
        leaver, stayer = (asyncio.create_task(embed(number)) for number in range(2))
        await asyncio.sleep(0.5)
        leaver.cancel()
        assert await stayer == -1
        assert model.batches == [(1.0, [1])]
        assert embed.statistics().dropped == 1

    virtually(program())


def test_a_caller_that_leaves_while_the_batch_is_about_to_begin_is_not_in_it():
    async def program() -> None:
        embed = batched(max_size=2)(model := Model())
        leaver, stayer = (asyncio.create_task(embed(number)) for number in range(2))
        await asyncio.sleep(0)  # Both have joined: the batch is full, and its task has not begun.
        leaver.cancel()
        assert await stayer == -1
        assert model.batches == [(0.0, [1])]
        assert embed.statistics().dropped == 1

    virtually(program())


def test_a_batch_that_all_have_left_before_it_began_frees_its_place():
    async def program() -> None:
        embed = batched(max_size=2)(model := Model())
        tasks = [asyncio.create_task(embed(number)) for number in range(2)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await each(*tasks)  # type: ignore[arg-type]
        assert model.batches == []
        assert await each(embed(2), embed(3)) == [-2, -3]

    virtually(program())


def test_a_batch_whose_task_was_cancelled_before_its_first_step_ends():
    async def program() -> None:
        embed = batched(max_size=2)(model := Model())
        tasks = [asyncio.create_task(embed(number)) for number in range(2)]
        await asyncio.sleep(0)
        (batch,) = asyncio.all_tasks() - {*tasks, asyncio.current_task()}
        batch.cancel()
        assert [type(each) for each in await each(*tasks)] == [asyncio.CancelledError] * 2  # type: ignore[arg-type]
        assert model.batches == []
        assert await each(embed(2), embed(3)) == [-2, -3]

    virtually(program())


def test_the_rest_of_a_batch_goes_on_without_a_caller_that_left():
    async def program() -> None:
        embed = batched(max_size=2)(model := Model())
        leaver, stayer = (asyncio.create_task(embed(number)) for number in range(2))
        await asyncio.sleep(0.5)
        leaver.cancel()
        assert await stayer == -1
        assert leaver.cancelled()
        assert model.cancelled == 0

    virtually(program())


def test_the_function_is_cancelled_when_all_have_left_and_the_last_one_waits_for_its_end():
    async def program() -> None:
        cleaned = []

        @batched(max_size=2)
        async def embed(requests: list[int]) -> list[int]:
            try:
                await asyncio.sleep(60.0)
            finally:
                await asyncio.sleep(1.0)
                cleaned.append(len(requests))
            return requests

        tasks = [asyncio.create_task(embed(number)) for number in range(2)]
        await asyncio.sleep(0.5)
        tasks[0].cancel()
        await each(tasks[0])  # type: ignore[arg-type]
        assert cleaned == []
        tasks[1].cancel()
        await each(tasks[1])  # type: ignore[arg-type]
        assert cleaned == [2]
        assert embed.statistics().running == 0

    virtually(program())


def test_a_request_whose_deadline_is_over_is_not_in_the_batch():
    async def program() -> None:
        embed = batched(max_size=1, max_wait_s=0)(model := Model(takes_s=3.0))
        context = Context()
        context.deadline = asyncio.get_running_loop().time() + 2.0
        answers = await each(embed(0), embed(1, context), embed(2))
        assert [requests for _, requests in model.batches] == [[0], [2]]
        assert (answers[0], answers[2]) == (0, -2)
        assert isinstance(answers[1], DeadlineExceeded)
        assert embed.statistics().dropped == 1

    virtually(program())


# ---- policies ---------------------------------------------------------------------------------------------------


def test_a_request_is_rejected_when_its_time_in_the_queue_is_over():
    async def program() -> None:
        embed = batched(max_size=1, max_wait_s=0, policy=QueuePolicy(timeout_s=1.5))(Model())
        loop = asyncio.get_running_loop()
        began, ended = loop.time(), dict[int, float]()

        async def call(number: int) -> Any:
            try:
                return await embed(number)
            finally:
                ended[number] = round(loop.time() - began, 6)

        answers = await each(*(call(number) for number in range(4)))
        assert answers[:2] == [0, -1]
        assert ended == {0: 1.0, 1: 2.0, 2: 1.5, 3: 1.5}
        for error in answers[2:]:
            assert isinstance(error, Overloaded)
            assert "it has waited for the 1.5 s that its queue policy allows" in str(error)
        assert embed.statistics().rejected == 2

    virtually(program())


def test_a_request_is_not_rejected_while_there_is_a_place():
    async def program() -> None:
        embed = batched(max_wait_s=9.0, policy=QueuePolicy(timeout_s=2.0))(model := Model())
        assert await embed(1) == -1
        assert model.batches == [(2.0, [1])]

    virtually(program())


def test_a_delayed_request_goes_after_the_others_and_is_answered():
    async def program() -> None:
        policy = QueuePolicy(timeout_s=0.5, on_timeout="delay")
        embed = batched(max_size=1, max_wait_s=0, policy=policy)(model := Model())
        answers = await each(embed(0), embed(1), later(0.8, embed(2)))
        assert answers == [0, -1, -2]
        assert [requests for _, requests in model.batches] == [[0], [2], [1]]

    virtually(program())


def test_a_full_queue_rejects_at_once():
    async def program() -> None:
        embed = batched(max_size=1, max_wait_s=0, policies={0: QueuePolicy(max_waiting=2)})(Model())
        running = asyncio.create_task(embed(0))
        await asyncio.sleep(0.1)
        answers = await each(*(embed(number) for number in range(1, 4)), embed(4, prioritized(1)))
        assert [answers[0], answers[1], answers[3]] == [-1, -2, -4]
        assert isinstance(answers[2], Overloaded)
        assert "priority 0: 2 requests wait already" in str(answers[2])
        await running

    virtually(program())


def test_a_request_may_shorten_its_own_time():
    async def program() -> None:
        embed = batched(max_size=1, max_wait_s=0, policy=QueuePolicy(allow_override=True))(Model())
        own = [prioritized(0, queue_timeout_s=value) for value in (0.5, "soon", 0)]
        answers = await each(embed(0), embed(1), *(embed(2, context) for context in own))
        assert answers[:2] == [0, -1]
        assert [type(answer).__mro__[1] for answer in answers[3:]] == [InvalidRequest] * 2
        assert isinstance(answers[2], Overloaded)
        assert "queue_timeout_s='soon': must be a number of seconds above 0" in str(answers[3])
        assert await batched(max_wait_s=0)(Model())(1, own[1]) == -1  # Without the policy, the metadata means nothing.

    virtually(program())


# ---- what a batch sees ------------------------------------------------------------------------------------------

variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)


def test_the_variables_of_a_request_are_not_seen_by_the_batch():
    async def program() -> None:
        @batched()
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

        @batched()
        async def embed(requests: list[int], contexts: list[Context]) -> list[str]:
            mine = current_context()
            assert mine is not None
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
