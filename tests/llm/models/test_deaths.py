"""Answers whose engine dies. In virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.llm.test_answer import GREEDY, Engine, Fleet, in_virtual_time, made, read, text_of
from triton_distributed.llm import AnswerLost, EngineDead, Output, Request
from triton_distributed.testing.network import LocalConnection


class Dying(Engine):
    """Is dead after its first outputs."""

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        for each in made(request)[:2]:
            yield each
        raise EngineDead("planned")


@in_virtual_time
async def test_an_answer_goes_on_after_the_death_of_an_engine(here):
    fleet, request = Fleet(here), Request(max_tokens=6, sampling=GREEDY)
    dying = await fleet.worker(Dying())
    answer = fleet.answer(request)
    await anext(answer)
    await fleet.worker(Engine())
    text, _ = await read(answer)
    assert (text, answer.losses) == (text_of(request)[1:], 1)
    with pytest.raises(AnswerLost, match="temperature above 0") as lost:
        await read(fleet.answer(Request(max_tokens=6), policy=Only(dying)))
    assert isinstance(lost.value.__cause__, EngineDead)


class Only:
    """Chooses one instance."""

    def __init__(self, worker: LocalConnection) -> None:
        self.id = worker.runtime.instance_id

    def __call__(self, request: Any, instances: Any, load: Any) -> Any:
        return next(each for each in instances if each.id == self.id)
