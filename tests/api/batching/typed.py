"""What type checkers make of batched functions. `make check` reads this file; no test runs it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import assert_type

import numpy as np
from numpy.typing import NDArray

import triton_distributed as trd


@dataclass
class Question:
    text: str


@dataclass
class Answer:
    text: str


ANSWER = trd.Unary[Question, Answer]("svc.ml.answer")


@trd.serve(ANSWER, max_inflight=64)
@trd.batched(max_size=32, max_wait_s=0.005)
def plain(requests: list[Question]) -> list[Answer]:
    return [Answer(each.text) for each in requests]


@trd.batched
async def on_loop(requests: list[Question]) -> list[Answer | Exception]:
    return [Answer(each.text) if each.text else ValueError("no text") for each in requests]


@trd.batched()
def with_contexts(requests: list[Question], contexts: list[trd.Context]) -> list[Answer | None]:
    return [Answer(context.id()) for context in contexts]


@trd.batched_arrays(pad=-1)
def arrays(batch: NDArray[np.float32], lengths: NDArray[np.intp]) -> NDArray[np.int64]:
    return batch.astype(np.int64)


class Service:
    @trd.serve(ANSWER)
    @trd.batched(preferred_sizes=[8, 16])
    async def answer(self, requests: list[Question]) -> list[Answer]:
        return []

    @trd.batched_arrays
    def arrays(self, batch: NDArray[np.float32], lengths: NDArray[np.intp]) -> NDArray[np.float64]:
        return batch.astype(np.float64)


FORMS: list[Callable[[Question], Awaitable[Answer]]] = [plain, on_loop, Service().answer]
WITH_CONTEXT: list[Callable[[Question, trd.Context], Awaitable[Answer]]] = [plain, on_loop, Service().answer]


async def accepted(here: trd.Connection) -> None:
    question = Question("what")
    assert_type(await plain(question), Answer)
    assert_type(await on_loop(question), Answer)
    assert_type(await with_contexts(question, trd.Context()), Answer | None)
    assert_type(await Service().answer(question), Answer)
    assert_type(await arrays(np.zeros(3, np.float32)), NDArray[np.int64])
    assert_type(await Service().arrays(np.zeros(3, np.float32)), NDArray[np.float64])
    assert_type(plain.statistics().mean_size, float)
    plain.function([question])
    Service.answer.function(Service(), [question])
    await here.serve(ANSWER, plain)
    await here.serve(ANSWER, Service().answer)


# Each line below has a slip that a type checker must find: `make check` fails if it does not.


async def refused() -> None:
    await plain("what")  # type: ignore[arg-type]
    await plain([Question("what")])  # type: ignore[arg-type]
    await Service().answer("what")  # type: ignore[arg-type]
    trd.batched(maxsize=3)  # type: ignore[call-overload]
    trd.QueuePolicy(on_timeout="wait")  # type: ignore[arg-type]


@trd.batched()  # type: ignore[arg-type]
def one_request(requests: Question) -> Answer:
    return Answer(requests.text)


@trd.serve(ANSWER)  # type: ignore[arg-type]
@trd.batched()
def other_type(requests: list[str]) -> list[Answer]:
    return [Answer(each) for each in requests]
