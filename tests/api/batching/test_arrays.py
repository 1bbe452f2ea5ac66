"""`batched_arrays`: what the function gets, and what each caller gets back."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import triton_distributed as trd
from tests.runtime.cluster import Cluster
from tests.timing import PATIENCE_S

F4 = NDArray[np.float32]
Lengths = NDArray[np.intp]


async def each(*calls: Any) -> list[Any]:
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.gather(*calls, return_exceptions=True)


def batches(**options: Any) -> tuple[Any, list[tuple[Any, Any]]]:
    """A batched function that returns its input plus one, and the inputs that it got."""
    seen: list[tuple[Any, Any]] = []

    @trd.batched_arrays(max_wait_s=0, **options)
    async def plus_one(batch: Any, lengths: Any) -> Any:
        seen.append((batch, lengths))
        return batch + 1

    return plus_one, seen


async def test_arrays_of_different_lengths_become_one():
    plus_one, seen = batches(pad=-1)
    answers = await each(*(plus_one(np.arange(length, dtype=np.float32)) for length in (2, 0, 3)))
    ((batch, lengths),) = seen
    assert batch.dtype == np.float32
    assert batch.tolist() == [[0, 1, -1], [-1, -1, -1], [0, 1, 2]]
    assert (lengths.tolist(), lengths.dtype) == ([2, 0, 3], np.intp)
    assert [answer.tolist() for answer in answers] == [[1, 2, 0], [0, 0, 0], [1, 2, 3]]


async def test_further_axes_stay_and_answers_are_cut_to_their_length():
    plus_one, seen = batches(cut=True)
    answers = await each(*(plus_one(np.ones((length, 2, 3))) for length in (1, 4)))
    assert seen[0][0].shape == (2, 4, 2, 3)
    assert seen[0][0][0, 1:].sum() == 0
    assert [answer.shape for answer in answers] == [(1, 2, 3), (4, 2, 3)]


async def test_each_caller_owns_its_answer():
    memory = np.zeros((8, 3))

    @trd.batched_arrays(max_wait_s=0)
    async def model(batch: Any, lengths: Any) -> Any:
        memory[: len(batch)] += 1
        return memory[: len(batch)]

    first, *_ = await each(model(np.ones(1)), model(np.ones(2)))
    await each(model(np.ones(1)))
    assert first.tolist() == [1, 1, 1]
    assert first.base is None


async def test_an_answer_of_one_number_is_an_array_without_axes():
    @trd.batched_arrays(max_wait_s=0)
    def total(batch: F4, lengths: Lengths) -> NDArray[np.float64]:
        return np.array([row[:length].sum() for row, length in zip(batch, lengths, strict=True)], np.float64)

    answers = await each(total(np.ones(3, np.float32)), total(np.ones(5, np.float32)))
    assert [(type(answer), answer.shape, float(answer)) for answer in answers] == [
        (np.ndarray, (), 3.0),
        (np.ndarray, (), 5.0),
    ]


async def test_arrays_that_do_not_fit_together_share_no_call():
    plus_one, seen = batches()
    requests: list[NDArray[Any]] = [
        np.ones((2, 3)),
        np.ones(2),
        np.ones((1, 3)),
        np.ones(2, np.float32),
        np.ones((1, 4)),
    ]
    answers = await each(*map(plus_one, requests))
    assert [batch.shape for batch, _ in seen] == [(2, 2, 3), (1, 2), (1, 2), (1, 1, 4)]
    assert plus_one.statistics().batches == 1
    assert [answer.dtype for answer in answers] == [request.dtype for request in requests]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ([1.0], "it is list, and model takes a NumPy array"),
        (np.float32(1), "it is float32, and model takes a NumPy array"),
        (np.array(1, np.float32), "its array has no axis, and model takes arrays of shape"),
        (np.ones(2), "its dtype is float64, and model takes float32"),
        (np.ones(9, np.float32), "its length is 9, above max_length=8"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_a_request_that_does_not_fit_fails_alone(request_, words):
    @trd.batched_arrays(max_wait_s=0, max_length=8)
    async def model(batch: F4, lengths: Lengths) -> F4:
        return batch

    invalid, good = await each(model(request_), model(np.ones(8, np.float32)))
    assert isinstance(invalid, trd.InvalidRequest)
    assert words in str(invalid).replace(model.function.__qualname__, "model")
    assert good.shape == (8,)


@pytest.mark.parametrize(
    ("result", "cut", "kind", "words"),
    [
        (
            [1, 2],
            False,
            TypeError,
            "returned list for a batch of 2 arrays: it must return an array with a row for each",
        ),
        (np.ones((3, 4)), False, ValueError, r"returned an array of shape (3, 4): the shape must be (2, …)"),
        (np.ones(()), False, ValueError, r"shape (): the shape must be (2, …)"),
        (np.ones((2, 9)), True, ValueError, r"shape (2, 9): the shape must be (2, 4, …), because of cut=True"),
    ],
)
async def test_a_result_of_another_shape_fails_each_caller(result, cut, kind, words):
    @trd.batched_arrays(max_wait_s=0, cut=cut)
    async def model(batch: Any, lengths: Any) -> Any:
        return result

    for error in await each(model(np.ones(4)), model(np.ones(2))):
        assert type(error) is kind
        assert words in str(error)


async def test_arrays_at_an_endpoint():
    class Model:
        @trd.batched_arrays(max_size=3, max_wait_s=PATIENCE_S, cut=True)
        def double(self, batch: F4, lengths: Lengths) -> F4:
            shapes.append(batch.shape)
            return batch * 2

    shapes: list[Any] = []
    cluster = Cluster()
    client = await cluster.connect(Model().double)
    requests = [np.arange(length, dtype=np.float32) for length in (5, 1, 3)]
    answers = await each(*map(client.call, requests))
    assert [answer.tolist() for answer in answers] == [(request * 2).tolist() for request in requests]
    assert shapes == [(3, 5)]
    assert isinstance((await each(client.call("text")))[0], trd.InvalidRequest)
    await cluster.close()


@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=9), cut=st.booleans(), tail=st.sampled_from([(), (2,)]))
def test_every_array_comes_back_in_its_place(lengths: list[int], cut: bool, tail: tuple[int, ...]):
    async def program() -> None:
        plus_one, seen = batches(max_size=4, cut=cut)
        requests = [np.full((length, *tail), number, np.int32) for number, length in enumerate(lengths)]
        answers = await each(*map(plus_one, requests))
        assert sum(len(batch) for batch, _ in seen) == len(lengths)
        for request, answer in zip(requests, answers, strict=True):
            assert (answer[: len(request)] == request + 1).all()
            assert not cut or answer.shape == request.shape

    asyncio.run(program())
