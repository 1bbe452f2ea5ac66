"""A stream whose chunks are put together, as clients do it, is the answer that is not streamed."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import triton_distributed as trd
from tests.llm.standin import StandIn, StandInModels, echo
from tests.llm.test_openai_api import request_of
from triton_distributed.llm import Models, serve_model
from triton_distributed.llm.engines.mock.engine import MockEngine
from triton_distributed.llm.http import openai_app


def random_request(chance: random.Random) -> tuple[str, dict[str, Any]]:
    chat = chance.random() < 0.5
    text = "".join(chance.choices("abc äß🙂", k=chance.randint(1, 12)))
    body: dict[str, Any] = {"model": "org/tiny", "max_tokens": chance.randint(1, 9), "seed": chance.randrange(2**63)}
    options = {"n": chance.randint(1, 4), "temperature": 0, "return_token_ids": True}
    body |= {name: value for name, value in options.items() if chance.random() < 0.5}
    if chat:
        body["messages"] = [{"role": "user", "content": text}]
        if chance.random() < 0.5:
            body |= {"logprobs": True, "top_logprobs": chance.randint(0, 3)}
        return "/v1/chat/completions", body
    body["prompt"] = chance.choice([text, [text, "second"], list(text.encode())])
    if chance.random() < 0.4:
        body["logprobs"] = chance.randint(0, 3)
    elif not isinstance(body["prompt"][0], int):
        body["echo"] = True
    return "/v1/completions", body


def folded(events: bytes) -> dict[str, Any]:
    """Put the chunks of a stream together, and check what each of them must be."""
    lines = events.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    *chunks, last = [json.loads(each.removeprefix("data: ")) for each in lines[:-2]]
    assert last["choices"] == []
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        assert chunk["usage"] is None
        assert (chunk["id"], chunk["model"]) == (last["id"], last["model"])
        for choice in chunk["choices"]:
            whole = found.setdefault(choice["index"], {"text": "", "logprobs": None, "finish_reason": None})
            assert whole["finish_reason"] is None
            whole["text"] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            if choice["logprobs"] is not None:
                whole["logprobs"] = whole["logprobs"] or {}
                for name, value in choice["logprobs"].items():
                    whole["logprobs"][name] = value if value is None else whole["logprobs"].get(name, []) + value
            if "token_ids" in choice:
                whole["token_ids"] = whole.get("token_ids", []) + choice["token_ids"]
            whole["finish_reason"] = choice["finish_reason"]
            whole["stop_reason"] = choice.get("stop_reason")
    return {"choices": [found[index] for index in sorted(found)], "usage": last["usage"]}


async def compare(app: Any, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Check that the folded stream of a request is its whole answer, or that both are the same refusal."""
    start, sent = await request_of(app, body, path)
    whole: dict[str, Any] = json.loads(sent["body"])
    begun, *parts = await request_of(app, body | {"stream": True, "stream_options": {"include_usage": True}}, path)
    assert begun["status"] == start["status"]
    events = b"".join(each["body"] for each in parts)
    if start["status"] != 200:
        assert json.loads(events) == whole
        return whole
    choices = []
    for choice in whole["choices"]:
        kept = ("logprobs", "finish_reason", "stop_reason", "token_ids")
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        kept_values = {key: choice[key] for key in kept if key in choice}
        if choice["logprobs"] is not None and not any(choice["logprobs"].values()):
            kept_values["logprobs"] = None  # No token was shown, and chunks have none.
        choices.append({"text": text} | kept_values)
    assert folded(events) == {"choices": choices, "usage": whole["usage"]}, body
    return whole


async def test_the_folded_stream_is_the_whole_answer():
    app = openai_app(StandInModels(StandIn(echo)))
    for number in range(100):
        assert "choices" in await compare(app, *random_request(random.Random(number)))


def random_fields(chance: random.Random) -> tuple[str, dict[str, Any]]:
    """A request with any of the fields that the mock engine and its front end honour."""
    path, body = random_request(chance)
    body["model"] = "m"
    body["max_tokens"] = chance.randint(1, 40)
    fields = {
        "temperature": chance.choice([0, 0.7, 1, 2]),
        "top_p": chance.random(),
        "top_k": chance.randint(-1, 50),
        "min_p": chance.random(),
        "presence_penalty": chance.uniform(-2, 2),
        "frequency_penalty": chance.uniform(-2, 2),
        "repetition_penalty": chance.uniform(0.1, 2),
        "logit_bias": {str(chance.randrange(256)): chance.uniform(-100, 100)},
        "stop": chance.choice(["a", "ma", ["ner ", "s ", "never"], ["tal", "talk"]]),
        "stop_token_ids": chance.sample(range(97, 123), 2),
        "min_tokens": chance.randint(0, 45),  # More than max_tokens is refused.
        "ignore_eos": chance.random() < 0.5,
        "n": chance.randint(1, 3),
        "user": "me",
    }
    body |= {name: value for name, value in fields.items() if chance.random() < 0.25}
    if chance.random() < 0.1:
        body["guided_choice"] = ["yes", "no", "perhaps \u00e4\u00df\U0001f642"]
    elif chance.random() < 0.1:
        body["response_format"] = {"type": "json_object"}
    return path, body


async def test_the_folded_stream_is_the_whole_answer_of_an_engine(trd_dir):
    """With a worker over its socket, and random requests with all fields that the engine takes."""
    async with trd.connect() as worker, trd.connect() as here, Models(here) as models:
        await serve_model(worker, MockEngine(name="m", answer_tokens="24"))
        await models.wait_for("m", 10)
        app, seen = openai_app(models), Counter[str]()
        for number in range(1000):
            whole = await compare(app, *random_fields(random.Random(number)))
            for choice in whole.get("choices", ()):
                reason = type(choice["stop_reason"]).__name__
                seen[f"{choice['finish_reason']} {reason}"] += 1
            seen["refused"] += "error" in whole
        assert min(seen[each] for each in ("stop NoneType", "stop str", "stop int", "length NoneType", "refused")) > 20
