"""A stream whose chunks are put together, as clients do it, is the answer that is not streamed."""

from __future__ import annotations

import json
import random
from typing import Any

from tests.llm.standin import StandIn, StandInModels, echo
from tests.llm.test_openai_api import request_of
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
    return {"choices": [found[index] for index in sorted(found)], "usage": last["usage"]}


async def test_the_folded_stream_is_the_whole_answer():
    app = openai_app(StandInModels(StandIn(echo)))
    for number in range(100):
        path, body = random_request(random.Random(number))
        _, sent = await request_of(app, body, path)
        whole = json.loads(sent["body"])
        choices = []
        for choice in whole["choices"]:
            entry = {key: choice[key] for key in ("logprobs", "finish_reason", "token_ids") if key in choice}
            choices.append({"text": choice["text"] if "text" in choice else choice["message"]["content"]} | entry)
        _, *parts = await request_of(app, body | {"stream": True, "stream_options": {"include_usage": True}}, path)
        stream = folded(b"".join(each["body"] for each in parts))
        assert stream == {"choices": choices, "usage": whole["usage"]}, body
