"""Batches of direct calls, without a worker: their times, callers that leave, and policies."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.api.batching.model import Model, each, later, prioritized, virtually
from triton_distributed.api.batching import QueuePolicy, batched
from triton_distributed.errors import DeadlineExceeded, InvalidRequest, Overloaded
from triton_distributed.runtime import Context
from triton_distributed.testing import Deadlock

# ---- when a batch begins ----------------------------------------------------------------------------------------


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


def test_nothing_is_left_when_the_only_caller_leaves():
    ended: list[float] = []

    async def program() -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        embed = batched(max_wait_s=9.0)(Model())
        leaver = asyncio.create_task(embed(0))
        await asyncio.sleep(0.5)
        leaver.cancel()
        await each(leaver)  # type: ignore[arg-type]
        try:
            await asyncio.Event().wait()  # A deadlock is found when no timer is left.
        finally:
            ended.append(loop.time() - began)

    with pytest.raises(Deadlock):
        virtually(program())
    assert ended == [0.5]


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
                await asyncio.Event().wait()
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


# ---- all of it together -----------------------------------------------------------------------------------------

POLICIES = st.builds(
    QueuePolicy,
    max_waiting=st.none() | st.integers(1, 5),
    timeout_s=st.none() | st.sampled_from([0.5, 2.0]),
    on_timeout=st.sampled_from(["reject", "delay"]),
)
CALLS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]),  # When it is made.
        st.integers(-1, 1),  # Its priority.
        st.none() | st.sampled_from([0.0, 0.25, 1.0, 1.5]),  # Seconds until the caller leaves.
        st.sampled_from(["answer", "own error", "error of all"]),
    ),
    min_size=1,
    max_size=25,
)


@given(
    calls=CALLS,
    max_size=st.integers(1, 4),
    max_batches=st.integers(1, 2),
    max_wait_s=st.sampled_from([0.0, 0.5]),
    preferred=st.booleans(),
    keep_order=st.booleans(),
    policy=POLICIES,
)
def test_every_call_ends_and_every_request_is_counted_once(
    calls, max_size, max_batches, max_wait_s, preferred, keep_order, policy
):
    running, most = 0, 0

    async def program() -> None:
        @batched(
            max_size=max_size,
            max_wait_s=max_wait_s,
            preferred_sizes=[1] if preferred else [],
            max_batches=max_batches,
            keep_order=keep_order and policy.on_timeout == "reject",
            policy=policy,
        )
        async def model(requests: list[int]) -> list[int | Exception]:
            nonlocal running, most
            assert 1 <= len(requests) <= max_size
            running += 1
            most = max(most, running)
            try:
                await asyncio.sleep(1.0)
            finally:
                running -= 1
            if any(calls[number][3] == "error of all" for number in requests):
                raise KeyError("all")
            return [number if calls[number][3] == "answer" else LookupError(number) for number in requests]

        async def call(number: int) -> Any:
            at, priority, leaves_s, _ = calls[number]
            await asyncio.sleep(at)
            async with asyncio.timeout(leaves_s):
                return await model(number, prioritized(priority))

        for number, answer in enumerate(await each(*map(call, range(len(calls))))):  # A call that hangs is a Deadlock.
            if isinstance(answer, int):
                assert answer == number
            elif type(answer) is LookupError:
                assert answer.args == (number,)
            else:
                assert isinstance(answer, KeyError | TimeoutError | Overloaded)
        counts = model.statistics()
        assert (counts.waiting, counts.running, running) == (0, 0, 0)
        assert counts.requests == len(calls) == counts.batched + counts.dropped + counts.rejected
        assert most <= max_batches

    virtually(program())
