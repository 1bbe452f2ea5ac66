"""Requests that were taken in silence or refused without a word that helps."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.llm.test_openai_api import request_of
from tests.llm.test_worker import Echo, connect
from triton_distributed.cli.failure import Failure
from triton_distributed.cli.model.chat import Chat
from triton_distributed.llm import InvalidParameter, Models, serve_model
from triton_distributed.llm.engines.openai import OpenAIEngine
from triton_distributed.llm.http import openai_app
from triton_distributed.llm.tokens.template import ChatTemplate


async def test_a_bias_of_a_token_that_the_model_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connect() as worker, connect() as here, Models(here) as models:
        await serve_model(worker, Echo("m"))
        model = await models.wait_for("m", 10)
        monkeypatch.setattr(type(model.prompts.tokenizer), "vocabulary", 256)
        for bias, status in (({"97": 1}, 200), ({"999999": 1}, 400)):
            body = {"model": "m", "prompt": "hi", "max_tokens": 3, "logit_bias": bias}
            start, *_, last = await request_of(openai_app(models), body, "/v1/completions")
            assert start["status"] == status
        error = json.loads(last["body"])["error"]
        assert error["param"] == "logit_bias"
        assert "token id 999999 is not in the vocabulary" in error["message"]


def test_a_prompt_of_too_many_characters_has_the_code_of_a_long_one() -> None:
    template = ChatTemplate("{% for message in messages %}{{ message.content }}{% endfor %}", {})
    with pytest.raises(InvalidParameter, match=r"^messages: the prompt has more than 16,777,216 characters$") as error:
        template.render([{"role": "user", "content": "x" * (17 << 20)}])
    assert error.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("status", "path", "says"),
    [
        (401, "/v1", "The key is wrong. Here: --api-key KEY"),
        (404, "/v1", "The key is wrong. Models that are served: a"),
        (404, "", "the URL should perhaps end with /v1: http://x/v1"),
    ],
)
def test_a_chat_says_what_to_do(status: int, path: str, says: str) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "a"}]})
        return httpx.Response(status, json={"error": {"message": "The key is wrong."}})

    with httpx.Client(transport=httpx.MockTransport(answer)) as http:
        chat = Chat(http, f"http://x{path}", {"model": "m"}, "", httpx.HTTPError)
        with pytest.raises(Failure, match=f"{says}$"):
            chat.say("hello")


def test_a_field_is_named_once() -> None:
    engine: Any = OpenAIEngine(url="http://127.0.0.1:1")
    content = json.dumps({"error": {"message": "max_tokens: too many", "param": "max_tokens"}}).encode()
    with pytest.raises(InvalidParameter, match="^max_tokens: too many$"):
        engine._check(400, content, None)
