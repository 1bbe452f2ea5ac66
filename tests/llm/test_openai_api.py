"""The OpenAI API over ASGI, used by the real `openai` client."""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import struct
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest

from tests.llm.standin import StandIn, StandInModels, echo
from triton_distributed.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    InvalidRequest,
    MessageTooLarge,
    NoInstances,
    Overloaded,
    StreamIncomplete,
)
from triton_distributed.llm import AnswerLost, EngineStalled, InvalidParameter, Usage
from triton_distributed.llm.http import openai_app
from triton_distributed.llm.http.bodies import NO_EFFECT, REFUSED, ChatBody, CompletionBody, EmbeddingBody
from triton_distributed.llm.http.facts import KEY, Facts
from triton_distributed.llm.models.delta import Delta

ROOT = Path(__file__).resolve().parents[2]
HELLO = [{"role": "user", "content": "hello"}]


# Each test that needs the client imports it: that takes 0.7 s, and each of pytest-xdist's processes collects this file.


def client_of(*models: StandIn, **options) -> Any:
    import openai

    app = openai_app(StandInModels(*models), **options)
    web = httpx2.AsyncClient(transport=httpx2.ASGITransport(app))
    return openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=web, max_retries=0)


async def request_of(
    app, body, path="/v1/chat/completions", leave: asyncio.Event | None = None, pause_s: float = 0
) -> list[dict[str, Any]]:
    """Send one request over bare ASGI. The client leaves when `leave` is set, and does not read for a while after the
    first part of a stream. Returns the messages."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    incoming = [{"type": "http.request", "body": raw, "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive():
        if incoming:
            return incoming.pop()
        await (leave or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)
        if pause_s and len(sent) == 2:
            await asyncio.sleep(pause_s)

    await app({"type": "http", "method": "POST", "path": path, "headers": []}, receive, send)
    return sent


async def test_chat_streamed_and_whole():
    async with client_of(StandIn(echo, aliases=("tiny",))) as client:
        whole = await client.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=7, seed=3)
        assert whole.object == "chat.completion"
        assert whole.model == "tiny"
        assert len(whole.choices[0].message.content) == 7
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage.prompt_tokens == len("user:hello|")
        assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (7, 18)
        assert whole.usage.prompt_tokens_details.cached_tokens == 2
        stream = await client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_tokens=7,
            seed=3,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [each async for each in stream]
    assert [chunk.choices[0].index for chunk in chunks[:2]] == [0, 1]
    assert all(chunk.choices[0].delta.role == "assistant" for chunk in chunks[:2])
    assert all(chunk.usage is None for chunk in chunks[:-1])
    texts, ends = {0: "", 1: ""}, list[int]()
    for chunk in chunks[:-1]:
        choice = chunk.choices[0]
        assert not ends.count(choice.index)  # Nothing follows the end of a choice.
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            ends.append(choice.index)
    assert sorted(ends) == [0, 1]
    assert texts[0] == whole.choices[0].message.content
    assert texts[1] != texts[0]  # Each answer has a seed of its own.
    assert chunks[-1].choices == []
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (11, 14)


async def test_an_adapter_is_a_model_with_a_parent():
    model = StandIn(echo, aliases=("tiny",), adapters=("sql",))
    async with client_of(model) as client:
        listed = {each.id: getattr(each, "parent", None) for each in (await client.models.list()).data}
        assert listed == {"org/tiny": None, "tiny": None, "sql": "org/tiny"}
        answer = await client.chat.completions.create(model="sql", messages=HELLO, max_tokens=2)
        assert answer.model == "sql"
    assert model.asked[-1].model == "sql", "the engine takes the adapter from it"


async def test_variables_of_the_template():
    async with client_of(StandIn(echo)) as client:
        for extra, tokens in (
            ({}, 11),
            ({"chat_template_kwargs": {"mood": "calm"}}, 15),
            ({"add_generation_prompt": False}, 10),
        ):
            found = await client.chat.completions.create(
                model="org/tiny", messages=HELLO, max_tokens=1, extra_body=extra
            )
            assert found.usage.prompt_tokens == tokens


async def test_log_probabilities_of_both_kinds():
    import openai

    async with client_of(StandIn(echo)) as client:
        chat = await client.chat.completions.create(
            model="org/tiny", messages=HELLO, max_tokens=3, logprobs=True, top_logprobs=2
        )
        content = chat.choices[0].logprobs.content
        assert "".join(each.token for each in content) == chat.choices[0].message.content
        assert [len(each.top_logprobs) for each in content] == [2, 2, 2]
        assert bytes(content[0].bytes).decode() == content[0].token
        text = await client.completions.create(model="org/tiny", prompt="abc", max_tokens=3, logprobs=1)
        found = text.choices[0].logprobs
        assert found.tokens == list(text.choices[0].text)
        assert found.text_offset == [0, 1, 2]
        assert found.top_logprobs[0] == {found.tokens[0]: -0.25}
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="org/tiny", messages=HELLO, logprobs=True, top_logprobs=6)
        assert caught.value.param == "top_logprobs"


async def test_completions_take_several_prompts_and_repeat_them():
    async with client_of(StandIn(echo)) as client:
        found = await client.completions.create(
            model="org/tiny", prompt=["abc", "defg"], n=2, max_tokens=2, echo=True, seed=1
        )
        assert [each.index for each in found.choices] == [0, 1, 2, 3]
        assert [each.text[:-2] for each in found.choices] == ["abc", "abc", "defg", "defg"]
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (7, 8)  # Each prompt counts once.
        ids = await client.completions.create(model="org/tiny", prompt=[97, 98, 99], max_tokens=2, seed=1)
        assert ids.choices[0].text == found.choices[0].text[-2:]


async def test_embeddings_as_base64_and_as_numbers():
    async with client_of(StandIn(echo, embeddings=True)) as client:
        as_numbers = await client.embeddings.create(model="org/tiny", input=["a", "bcd"], encoding_format="float")
        assert [each.embedding for each in as_numbers.data] == [[1, 0.5, -1], [3, 0.5, -1]]
        as_text = await client.embeddings.with_raw_response.create(
            model="org/tiny", input="bcd", encoding_format="base64"
        )
        raw = base64.b64decode(as_text.http_response.json()["data"][0]["embedding"])
        assert struct.unpack("<3f", raw) == (3, 0.5, -1)
        assert as_numbers.usage.total_tokens == 4


async def test_models_and_their_aliases():
    import openai

    async with client_of(StandIn(echo, aliases=("tiny",))) as client:
        assert [each.id async for each in client.models.list()] == ["org/tiny", "tiny"]
        assert (await client.models.retrieve("org/tiny")).owned_by == "triton-distributed"
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("other")
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


REFUSALS = [
    (
        InvalidParameter("messages", "too long", "context_length_exceeded"),
        "BadRequestError",
        "context_length_exceeded",
    ),
    (InvalidRequest("", "no such seed"), "BadRequestError", None),
    (MessageTooLarge("the request", 10, 5), "APIStatusError", "request_too_large"),
    (Overloaded("a.b.c", 1, "full", retry_after_s=2.5), "InternalServerError", "overloaded"),
    (NoInstances("a.b.c"), "InternalServerError", "unavailable"),
    (ConnectionFailed("a.b.c", []), "InternalServerError", "unavailable"),
    (DeadlineExceeded("a.b.c", 1), "InternalServerError", "timeout"),
    (EngineStalled("tiny", 30), "InternalServerError", "engine_stalled"),
    (AnswerLost("tiny", "guided", 3), "InternalServerError", "answer_lost"),
    (StreamIncomplete("a.b.c", 1, "x", "reset"), "InternalServerError", "worker_lost"),
    (ZeroDivisionError("a defect"), "InternalServerError", "internal_error"),
]
STATUSES = [400, 400, 413, 503, 503, 503, 504, 504, 502, 502, 500]


async def test_errors_before_and_within_a_stream():
    import openai

    for (error, kind, code), status in zip(REFUSALS, STATUSES, strict=True):

        async def fails(prompt, request, error=error):
            if request.sampling.seed:
                yield Delta(text="a", token_ids=[97])
            raise error

        model = StandIn(fails)
        async with client_of(model) as client:
            for streamed in (False, True):
                with pytest.raises(getattr(openai, kind)) as caught:
                    await client.chat.completions.create(model="org/tiny", messages=HELLO, stream=streamed)
                assert (caught.value.status_code, caught.value.code) == (status, code)
                assert ("retry-after" in caught.value.response.headers) == (status == 503)
            if isinstance(error, Overloaded):
                assert caught.value.response.headers["retry-after"] == "3"
            stream = await client.chat.completions.create(model="org/tiny", messages=HELLO, stream=True, seed=1)
            with pytest.raises(openai.APIError) as midway:
                [each async for each in stream]
            assert midway.value.code == code
        assert not model.running


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 0}, "n"),
        ({"stop": [""]}, "stop[0]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"max_completion_tokens": 5000}, "max_completion_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"model": None}, "model"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"guided_regex": "a+"}, "guided_regex"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"stop": ["a", "x" * 1001]}, "stop[1]"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "g"}, "tool_choice"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "tool_choice": {"type": "function", "function": {"name": "g"}},
            },
            "tool_choice",
        ),
        ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"messages": [{"role": "user", "content": "x" * 1000}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
        ),
    ],
)
async def test_an_invalid_field_is_named(change, param):
    app = openai_app(StandInModels(StandIn(echo)))
    start, body = await request_of(app, {"model": "org/tiny", "messages": HELLO} | change)
    assert start["status"] == 400
    error = json.loads(body["body"])["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


async def test_every_refused_field_is_refused_and_every_other_is_taken():
    from openai.resources import AsyncCompletions, AsyncEmbeddings
    from openai.resources.chat import AsyncCompletions as AsyncChatCompletions

    resources = (AsyncChatCompletions, AsyncCompletions, AsyncEmbeddings)
    known = [set(inspect.signature(each.create).parameters) for each in resources]
    app = openai_app(StandInModels(StandIn(echo)))
    bodies: list[type[msgspec.Struct]] = [ChatBody, CompletionBody, EmbeddingBody]
    for fields, body_type in zip(known, bodies, strict=True):
        unknown = fields - {each.name for each in msgspec.structs.fields(body_type)}
        assert unknown == {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    for body, path, base in (
        (ChatBody, "/v1/chat/completions", {"messages": HELLO}),
        (CompletionBody, "/v1/completions", {"prompt": "ab"}),
    ):
        for field in msgspec.structs.fields(body):
            if field.name in base or field.name == "model":
                continue
            if field.type is not Any:  # It is honoured, and has a type.
                continue
            assert (field.name in NO_EFFECT) != (field.name in REFUSED)
            sent = await request_of(app, {"model": "org/tiny", field.name: "x", **base}, path)
            refused = field.name in REFUSED
            assert sent[0]["status"] == (400 if refused else 200), field.name
            if refused:
                assert json.loads(sent[1]["body"])["error"]["param"] == field.name


def test_the_page_says_what_is_done_with_each_field():
    fields: dict[tuple[str, str], list[str]] = {}
    for route, body in (("chat", ChatBody), ("completions", CompletionBody), ("embeddings", EmbeddingBody)):
        for field in msgspec.structs.fields(body):
            done = "honoured"
            if field.type is Any:
                done = f"no effect: {NO_EFFECT[field.name]}" if field.name in NO_EFFECT else "refused: "
                done += REFUSED[field.name][0] if field.name in REFUSED else ""
            fields.setdefault((field.name, done), []).append(route)
    page = (ROOT / "docs/llm/openai-api.md").read_text()
    table = [line for line in page.partition("## Errors")[0].splitlines() if line.startswith("| `")]
    assert table == [f"| `{name}` | {', '.join(routes)} | {done} |" for (name, done), routes in sorted(fields.items())]


async def test_options_reach_the_engine():
    model = StandIn(echo, guides=("schema",), tools=True, extra_fields=("mood", "verbosity"))
    tools = [{"type": "function", "function": {"name": "f"}}]
    async with client_of(model) as client:
        await client.chat.completions.create(
            model="org/tiny",
            messages=HELLO,
            stop="x",
            temperature=0,
            top_p=0.5,
            presence_penalty=1,
            frequency_penalty=-1,
            logit_bias={"5": -100},
            seed=9,
            tools=tools,
            tool_choice="auto",
            verbosity="low",
            response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
            extra_body={
                "top_k": 4,
                "min_p": 0.1,
                "repetition_penalty": 1.5,
                "min_tokens": 2,
                "ignore_eos": True,
                "stop_token_ids": [7],
                "mood": "calm",
                "unheard_of": 1,
            },
        )
    (asked,) = model.asked
    assert asked.max_tokens == 1000 - len("user:hello|")
    assert (asked.stop, asked.stop_token_ids, asked.ignore_eos, asked.min_tokens) == (["x"], [7], True, 2)
    assert (asked.tools, asked.tool_choice) == (tools, "auto")
    assert asked.guide is not None
    assert asked.guide.schema == {"type": "object"}
    assert asked.extra == {"mood": "calm", "verbosity": "low"}
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.5, 4, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.5)
    assert (sampling.logit_bias, sampling.seed) == ({5: -100}, 9)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_leaves_ends_the_request(stream, n, begun):
    reached, leave = asyncio.Event(), asyncio.Event()

    async def waits(prompt, request):
        if begun:
            yield Delta(text="a", token_ids=[97])
        reached.set()
        await asyncio.Event().wait()

    model = StandIn(waits)
    body = {"model": "org/tiny", "messages": HELLO, "stream": stream, "n": n}
    task = asyncio.create_task(request_of(openai_app(StandInModels(model)), body, leave=leave))
    await reached.wait()
    assert model.running
    leave.set()
    sent = await task
    assert not model.running
    assert not any(each.get("more_body") is False for each in sent)


@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_has_left_before_the_answer_begins(n):
    async def waits(prompt, request):
        await asyncio.Event().wait()
        yield Delta()

    model, leave = StandIn(waits), asyncio.Event()
    leave.set()
    body = {"model": "org/tiny", "messages": HELLO, "n": n}
    assert await request_of(openai_app(StandInModels(model)), body, leave=leave) == []
    assert not model.running


async def test_a_request_that_is_answered_at_once_has_no_second_task():
    before = asyncio.all_tasks()

    async def looks(prompt, request):
        assert asyncio.all_tasks() == before
        yield Delta(text="a", token_ids=[97], finish_reason="stop", usage=Usage(1, 1, 0))

    sent = await request_of(openai_app(StandInModels(StandIn(looks))), {"model": "org/tiny", "messages": HELLO})
    assert sent[0]["status"] == 200


async def test_tool_calls_and_reasoning_are_put_together():
    async def calls(prompt, request):
        function = {"name": "f", "arguments": ""}
        yield Delta(reasoning="I ")
        yield Delta(reasoning="think.")
        yield Delta(tool_calls=[{"index": 0, "id": "call_1", "type": "function", "function": function}])
        yield Delta(tool_calls=[{"index": 0, "function": {"arguments": '{"a":'}}])
        yield Delta(tool_calls=[{"index": 0, "function": {"arguments": "1}"}}])
        yield Delta(finish_reason="tool_calls", usage=Usage(1, 5))

    async with client_of(StandIn(calls, tools=True)) as client:
        asked = {"model": "org/tiny", "messages": HELLO}
        whole = (await client.chat.completions.create(**asked)).choices[0]
        async with client.chat.completions.stream(**asked) as stream:
            streamed = (await stream.get_final_completion()).choices[0]
        chunks = [each async for each in await client.chat.completions.create(**asked, stream=True)]
    for choice in (whole, streamed):
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        assert (call.id, call.function.name, call.function.arguments) == ("call_1", "f", '{"a":1}')
    assert whole.message.content is None
    assert whole.message.reasoning_content == whole.message.reasoning == "I think."
    assert "".join(getattr(each.choices[0].delta, "reasoning", "") for each in chunks) == "I think."


async def test_the_body_is_bounded_and_must_be_json():
    app = openai_app(StandInModels(StandIn(echo)), max_body_bytes=100)
    assert (await request_of(app, b" " * 101))[0]["status"] == 413
    assert (await request_of(app, b"{"))[0]["status"] == 400
    assert (await request_of(app, b"[]"))[0]["status"] == 400
    assert (await request_of(app, b"{}", "/v1/other"))[0]["status"] == 404
    wrong = (await request_of(app, b"{}", "/v1/models"))[0]
    assert (wrong["status"], dict(wrong["headers"])[b"allow"]) == (405, b"GET")


async def test_the_seeds_of_several_answers_have_64_bits():
    model = StandIn(echo)
    await request_of(
        openai_app(StandInModels(model)), {"model": "org/tiny", "messages": HELLO, "n": 2, "seed": 2**63 - 1}
    )
    assert [each.sampling.seed for each in model.asked] == [2**63 - 1, -(2**63)]


async def test_the_memory_of_all_requests_is_bounded():
    model, late, left = StandIn(echo), asyncio.Event(), asyncio.Event()
    app = openai_app(StandInModels(model), max_held_bytes=40 * 1024 * 1024)
    body = msgspec.json.encode({"model": "org/tiny", "messages": HELLO, "metadata": "x" * 8_000_000})
    parts = iter([body[:9_000_000], b""])
    status: list[int] = []

    async def receive() -> dict[str, Any]:
        if (part := next(parts, b"")) == b"":
            late.set()
            await left.wait()
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": True}

    async def send(message: MutableMapping[str, Any]) -> None:
        raise AssertionError(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    slow = asyncio.create_task(app(scope, receive, send))
    await late.wait()
    start, refused = await request_of(app, body)
    status.append(start["status"])
    assert dict(start["headers"])[b"retry-after"] == b"1"
    assert json.loads(refused["body"])["error"]["type"] == "overloaded_error"
    left.set()
    await slow
    status += [(await request_of(app, each))[0]["status"] for each in (body, b"[" + b"{}," * 400_000, body)]
    assert status == [503, 200, 413, 200]


@pytest.mark.parametrize("place", [b'"messages":[{"role":"user","content":%s}]', b'"unknown":%s'])
async def test_a_body_that_nests_too_deeply_is_invalid(place, caplog):
    deep = b'{"model":"org/tiny",' + place % (b"[" * 100_000 + b"]" * 100_000) + b"}"
    start, whole = await request_of(openai_app(StandInModels(StandIn(echo))), deep)
    assert (start["status"], json.loads(whole["body"])["error"]["code"]) == (400, "invalid_json")
    assert not caplog.records


@pytest.mark.parametrize("field", ["top_k", "max_tokens", "max_completion_tokens", "min_tokens", "seed"])
async def test_a_number_that_cannot_travel_is_invalid(field):
    body = {"model": "org/tiny", "messages": HELLO, field: 2**63}
    start, whole = await request_of(openai_app(StandInModels(StandIn(echo, context_tokens=0))), body)
    assert (start["status"], json.loads(whole["body"])["error"]["param"]) == (400, field)


@pytest.mark.parametrize("one", ["a", [97]])
async def test_a_request_has_a_bounded_number_of_inputs(one):
    app = openai_app(StandInModels(StandIn(echo, embeddings=True)))
    for count, status in ((2048, 200), (2049, 400)):
        start, whole = await request_of(app, {"model": "org/tiny", "input": [one] * count}, "/v1/embeddings")
        assert start["status"] == status
    assert json.loads(whole["body"])["error"]["param"] == "input"


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
async def test_the_client_of_a_complete_answer_has_not_left(stream, n):
    """Servers tell a task that waits for the client's end of it when the answer is complete, too."""
    watched, complete = asyncio.Event(), asyncio.Event()
    body = {"model": "org/tiny", "messages": HELLO, "stream": stream, "n": n}
    incoming = [{"type": "http.request", "body": json.dumps(body).encode()}]
    facts = Facts()

    async def waits(prompt, request):
        await watched.wait()
        yield Delta(text="a", token_ids=[97], finish_reason="stop", usage=Usage(1, 1))

    async def receive():
        if incoming:
            return incoming.pop()
        watched.set()
        await complete.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.body" and not message.get("more_body"):
            complete.set()

    app = openai_app(StandInModels(StandIn(waits)))
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], KEY: facts}
    await app(scope, receive, send)
    assert (facts.status, facts.error) == (200, "")
    assert facts.usage == Usage(1, n)


async def test_a_silent_stream_has_heartbeats_and_a_later_error_is_a_chunk():
    leave, pinged = asyncio.Event(), asyncio.Event()

    async def slow(prompt, request):
        await pinged.wait()
        if pinged.is_set():
            raise StreamIncomplete("a.b.c", 1, "x", "reset")
        yield Delta()

    app = openai_app(StandInModels(StandIn(slow)), heartbeat_s=0.001)
    sent: list[dict[str, Any]] = []
    incoming = [
        {"type": "http.request", "body": json.dumps({"model": "org/tiny", "messages": HELLO, "stream": True}).encode()}
    ]

    async def receive():
        return incoming.pop() if incoming else await leave.wait()

    async def send(message):
        sent.append(message)
        if message.get("body") == b": ping\n\n":
            pinged.set()

    await app({"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}, receive, send)
    assert sent[0]["status"] == 200
    opening, error = sent[-1]["body"].split(b"\n\n", 1)
    assert b'"role":"assistant"' in opening
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "worker_lost"
    assert sent[-1]["more_body"] is False
