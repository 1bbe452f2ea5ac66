"""A request that meets the end of a model's last worker: a successor answers, or it gets 404."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from tests.llm.standin import StandIn, StandInModels, echo
from tests.llm.test_openai_api import HELLO, request_of
from tests.llm.test_worker import Echo, connect
from triton_distributed.errors import Draining
from triton_distributed.llm import Models, serve_model
from triton_distributed.llm.http import openai_app
from triton_distributed.llm.models.delta import Delta
from triton_distributed.llm.models.prompts import Prompt


async def drains(prompt: Prompt, request: Any) -> AsyncGenerator[Delta]:
    """The only worker ends, and discovery has not told yet."""
    if prompt.ids:
        raise Draining("models.m.generate", 1, "it drains")
    yield Delta()


class Leaving(StandInModels):
    """A model whose worker ends, and what has its name afterwards."""

    def __init__(self, ends: StandIn, *later: StandIn) -> None:
        super().__init__(ends)
        self.ends, self.later = ends, later

    async def has_left(self, model: Any) -> bool:
        assert model is self.ends
        self.models = {each.card.name: each for each in self.later}
        return model not in self.later


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
async def test_a_request_that_the_last_worker_refuses_is_answered_by_the_next_model_of_that_name(
    path: str, stream: bool
) -> None:
    old, new = StandIn(drains), StandIn(echo, generation=1)
    body = {"model": "org/tiny", "stream": stream, "max_tokens": 5}
    body |= {"messages": HELLO} if path.startswith("chat") else {"prompt": "hello"}
    start, *parts = await request_of(openai_app(Leaving(old, new)), body, f"/v1/{path}")
    assert start["status"] == 200
    assert (len(old.asked), len(new.asked)) == (1, 1)
    assert not old.running | new.running
    if stream:
        assert parts[-1]["body"].endswith(b"data: [DONE]\n\n")
    start, whole = await request_of(openai_app(Leaving(old)), body, f"/v1/{path}")
    assert start["status"] == 404, "as for the next request"
    assert json.loads(whole["body"])["error"]["code"] == "model_not_found"
    start, whole = await request_of(openai_app(Leaving(old, old)), body, f"/v1/{path}")
    assert start["status"] == 503, "other workers of the model are there, and refuse too"


async def test_a_model_has_left_with_its_last_worker() -> None:
    async with connect() as one, connect() as two, connect() as here, Models(here) as models:
        first, second = await serve_model(one, Echo("m")), await serve_model(two, Echo("m"))
        model = await models.wait_for("m", 10)
        known = models._watch.table.entries[model.card.component].instances
        async with asyncio.timeout(10):
            while len(known) < 2:
                await asyncio.sleep(0)
            leaving = asyncio.ensure_future(models.has_left(model))
            await first.stop()
            while len(known) > 1:  # The news of the first worker's end comes.
                await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not leaving.done()
        await second.stop()
        assert await leaving
