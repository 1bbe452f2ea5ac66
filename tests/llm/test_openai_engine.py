"""The engine for servers of the OpenAI API, against a server over a socket that answers as each test plans."""

import asyncio
import contextlib
import json
import socket
import struct
from typing import Any

import msgspec
import pytest
import uvicorn

from triton_distributed.errors import Overloaded
from triton_distributed.llm import EmbedRequest, Guide, InvalidParameter, Request, Sampling, Usage, packed
from triton_distributed.llm.engines.mock.publisher import EventPublisher
from triton_distributed.llm.engines.openai import OpenAIEngine

LISTED = {"object": "list", "data": [{"id": "org/m", "max_model_len": 2048}]}


class Server:
    """An ASGI app. `answers` gives a status and the pieces of a body for each path."""

    def __init__(self):
        self.answers: dict[str, tuple[int, list[Any]]] = {"/v1/models": (200, [LISTED])}
        self.bodies = []
        self.headers = {}
        self.left = asyncio.Event()
        self.hold = False

    async def __call__(self, scope, receive, send):
        body = b""
        message: dict[str, Any] = {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
        self.bodies.append(json.loads(body) if body else None)
        self.headers = dict(scope["headers"])
        status, pieces = self.answers[scope["path"]]
        kind = b"application/json" if isinstance(pieces[0], dict) else b"text/event-stream"
        headers = [(b"content-type", kind), (b"retry-after", b"7")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for piece in pieces:
            if piece is None:
                raise ConnectionError("planned")
            data = json.dumps(piece).encode() if isinstance(piece, dict) else piece
            await send({"type": "http.response.body", "body": data, "more_body": True})
        if self.hold:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left.set()
        await send({"type": "http.response.body", "body": b""})


@contextlib.asynccontextmanager
async def served(**options):
    app = Server()
    config = uvicorn.Config(app, lifespan="off", log_config=None, loop="none", ws="none")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.create_task(server._serve(sockets=[listener]))
        engine = OpenAIEngine(url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1/", **options)
        try:
            yield app, engine
        finally:
            await engine.close()
            server.should_exit = True
            await task


def stream(*chunks, end=b"data: [DONE]\n\n"):
    return b"".join(b"data: " + json.dumps(each, ensure_ascii=False).encode() + b"\n\n" for each in chunks) + end


def chunk(finish=None, **delta):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


async def read(engine, **fields):
    fields = {"messages": [{"role": "user", "content": "hi"}]} | fields
    return [each async for each in engine.generate(Request(**fields))]


USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
WHOLE = stream(
    chunk(role="assistant", content=""),
    chunk(reasoning_content="hm"),
    chunk(content="a\u2028b é"),
    chunk(tool_calls=[{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}]),
    chunk("tool_calls"),
    {"choices": [], "usage": USAGE},
)


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
async def test_an_answer_is_the_same_wherever_its_pieces_end(size, line_end):
    async with served() as (app, engine):
        await engine.start()
        data = b": ping" + line_end + WHOLE.replace(b"\n", line_end)
        app.answers["/v1/chat/completions"] = 200, [data[at : at + size] for at in range(0, len(data), size)]
        found = await read(engine)
        assert [each.reasoning for each in found] == ["hm", None, None, None]
        assert found[1].text == "a\u2028b é"
        assert found[2].tool_calls[0]["function"] == {"name": "f", "arguments": "{}"}
        assert found[3].finish_reason == "tool_calls"
        assert found[3].usage == Usage(prompt_tokens=9, completion_tokens=3, cached_tokens=4)
        assert (engine.metrics().active, engine.metrics().cached_tokens) == (0, 4)


async def test_a_request_that_names_an_adapter_goes_to_the_servers_model_of_that_name():
    async with served(adapters="sql, chat") as (app, engine):
        app.answers["/v1/models"] = 200, [{"data": [{"id": "sql"}, {"id": "org/m"}, {"id": "chat"}]}]
        app.answers["/v1/chat/completions"] = 200, [stream(chunk("stop"))]
        await engine.start()
        assert (engine.model.card.name, engine.model.card.adapters) == ("org/m", ("sql", "chat"))
        for name in ("chat", "org/m", "an-alias"):
            await read(engine, model=name)
        assert [each["model"] for each in app.bodies[1:]] == ["chat", "org/m", "org/m"]
    async with served(adapters="sql") as (_, engine):
        with pytest.raises(InvalidParameter, match="adapters: the server does not have 'sql'; it has: org/m"):
            await engine.start()


async def test_what_a_request_asks_reaches_the_server():
    async with served(name="mine", api_key="secret") as (app, engine):
        await engine.start()
        assert (engine.model.card.name, engine.model.card.context_tokens) == ("mine", 2048)
        app.answers["/v1/chat/completions"] = app.answers["/v1/completions"] = 200, [stream(chunk("stop"))]
        tool = {"type": "function", "function": {"name": "f"}}
        sampling = Sampling(temperature=0, top_k=3, seed=5, logit_bias={7: 1.5}, logprobs=2)
        await read(
            engine,
            max_tokens=8,
            min_tokens=2,
            stop=["x"],
            ignore_eos=True,
            sampling=sampling,
            guide=Guide(schema={"type": "object"}),
            tools=[tool],
            tool_choice="auto",
            extra={"reasoning_effort": "low"},
        )
        body = app.bodies[-1]
        assert app.headers[b"authorization"] == b"Bearer secret"
        assert body.pop("response_format")["json_schema"]["schema"] == {"type": "object"}
        assert body == {
            "model": "org/m",
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 8,
            "min_tokens": 2,
            "stop": ["x"],
            "ignore_eos": True,
            "temperature": 0,
            "top_p": 1,
            "top_k": 3,
            "seed": 5,
            "logit_bias": {"7": 1.5},
            "logprobs": True,
            "top_logprobs": 2,
            "tools": [tool],
            "tool_choice": "auto",
            "reasoning_effort": "low",
        }
        await read(engine, messages=None, text="once", sampling=Sampling(logprobs=1))
        assert (app.bodies[-1]["prompt"], app.bodies[-1]["logprobs"]) == ("once", 1)
        with pytest.raises(InvalidParameter, match="takes text or messages"):
            await read(engine, messages=None, prompt=b"\0" * 4)
        with pytest.raises(InvalidParameter, match="only JSON"):
            await read(engine, guide=Guide(regex="a+"))


async def test_log_probabilities_of_both_routes():
    async with served() as (app, engine):
        await engine.start()
        chat = chunk("stop", content="a")
        tops = [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": float("-1e9")}]
        chat["choices"][0]["logprobs"] = {"content": [{"token": "a", "logprob": -0.5, "top_logprobs": tops}]}
        logprobs = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"b": -1e9, "a": -0.5}]}
        text = {"choices": [{"index": 0, "text": "a", "finish_reason": "stop", "logprobs": logprobs}]}
        app.answers["/v1/chat/completions"] = 200, [stream(chat)]
        app.answers["/v1/completions"] = 200, [stream(text)]
        for found in (await read(engine), await read(engine, messages=None, text="x")):
            (one,) = found[-1].logprobs
            assert found[-1].text == "a"
            assert (one.text, one.logprob) == ("a", -0.5)
            assert [(each.text, each.logprob) for each in one.top] == [("a", -0.5), ("b", -9999)]


async def test_errors_of_the_server():
    async with served() as (app, engine):
        await engine.start()

        async def failure(status, *pieces):
            app.answers["/v1/chat/completions"] = status, list(pieces)
            with pytest.raises(Exception) as caught:  # noqa: PT011
                await read(engine)
            return caught.value

        found = await failure(400, {"error": {"message": "too hot", "param": "temperature"}})
        assert isinstance(found, InvalidParameter)
        assert (found.param, found.reason) == ("temperature", "too hot")
        for status in (429, 503):
            found = await failure(status, {"error": {"message": "busy"}})
            assert isinstance(found, Overloaded)
            assert found.retry_after_s == 7
            assert "busy" in str(found)
        for status, piece, words in (
            (500, b"<html>oops", "500: <html>oops"),
            (401, {"error": {"message": "no key"}}, "401: no key"),
            (200, stream(chunk(content="a"), end=b""), "ended without a finish_reason"),
            (200, stream(chunk(content="a")), "ended without a finish_reason"),
            (200, stream({"error": {"message": "out of memory"}}), "in the middle: out of memory"),
            (200, b"data: {\n\n", "is not JSON"),
            (200, b"data: [1]\n\n", "is not an object"),
            (200, stream(chunk("abort")), "'abort'"),
            (200, stream(chunk("stop"), chunk(content="b")), "went on after"),
        ):
            found = await failure(status, piece)
            assert type(found) is ConnectionError
            assert words in str(found)
        found = await failure(200, stream(chunk(content="a"), end=b""), None)
        assert type(found) is ConnectionError, "the server closed the connection in the middle"
        assert engine.metrics().active == 0


async def test_a_caller_that_leaves_is_seen_by_the_server():
    async with served() as (app, engine):
        await engine.start()
        app.hold = True
        app.answers["/v1/chat/completions"] = 200, [stream(chunk(content="a"), end=b"")]
        first = asyncio.Event()

        async def caller():
            async for _ in engine.generate(Request(messages=[])):
                first.set()

        task = asyncio.create_task(caller())
        await first.wait()
        assert engine.metrics().active == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await app.left.wait()
        assert engine.metrics().active == 0


async def test_embeddings():
    async with served(tasks="embeddings") as (app, engine):
        two = [{"index": 1, "embedding": "AAAAQAAAgD8="}, {"index": 0, "embedding": [0.5, 1]}]
        app.answers["/v1/embeddings"] = 200, [{"data": two[1:]}]
        await engine.start()
        card = engine.model.card
        assert (card.embeddings, card.dimensions, card.chat, card.completions) == (True, 2, False, False)
        app.answers["/v1/embeddings"] = 200, [{"data": two, "usage": {"prompt_tokens": 3}}]
        found = await engine.embed(EmbedRequest(texts=["a", "b"], dimensions=2))
        assert found.vectors == [struct.pack("<2f", 0.5, 1), struct.pack("<2f", 2, 1)]
        assert found.prompt_tokens == 3
        assert app.bodies[-1]["dimensions"] == 2
        with pytest.raises(ConnectionError, match="2 embeddings for 1"):
            await engine.embed(EmbedRequest(texts=["a"]))


async def test_options_and_a_server_that_cannot_serve():
    for options, words in (
        ({"url": "localhost:1"}, "expected http"),
        ({"url": "http://h", "tasks": "chat,speech"}, "'speech'"),
        ({"url": "http://h", "slots": "none"}, "whole number from 1"),
        ({"url": "http://h", "api_key": "a", "api_key_file": "b"}, "given too"),
    ):
        with pytest.raises(InvalidParameter, match=words):
            OpenAIEngine(**options)
    async with served(model="other") as (_, engine):
        with pytest.raises(InvalidParameter, match="it has: org/m"):
            await engine.start()
    async with served() as (app, engine):
        app.answers["/v1/models"] = 200, [{"data": [{"id": "a"}, {"id": "b"}]}]
        with pytest.raises(InvalidParameter, match="a, b"):
            await engine.start()
    with socket.socket() as closed:  # Bound and not listening: no other program can take the port.
        closed.bind(("127.0.0.1", 0))
        engine = OpenAIEngine(url=f"http://127.0.0.1:{closed.getsockname()[1]}/v1")
        with pytest.raises(ConnectionError, match="models: ConnectError"):
            await engine.start()
        await engine.close()


async def test_with_a_tokenizer_prompts_are_token_ids_and_the_events_of_the_server_are_heard(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("hi")
    publisher = EventPublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*")
    publisher.start()
    publisher.publish(msgspec.msgpack.encode([1.0, [["BlockRemoved", [4]]], 0]))
    came = asyncio.Event()
    endpoints = {"kv_events": publisher.endpoint, "kv_replay": publisher.replay}
    async with served(tokenizer=str(tmp_path), **endpoints) as (app, engine):
        assert engine.kv_events(lambda events: came.set())
        await engine.start()
        card = engine.model.card
        assert (engine.model.tokenizer, engine.model.template) == (b"{}", "hi")
        assert (card.chat, card.completions, card.tools, card.extra_fields) == (True, True, False, ())
        app.answers["/v1/completions"] = 200, [stream({"choices": [{"text": "ab", "finish_reason": "length"}]})]
        (found,) = await read(engine, messages=None, prompt=packed([5, 6]), stop=["x"])
        assert (found.text, found.finish_reason) == ("ab", "length")
        assert (app.bodies[-1]["prompt"], app.bodies[-1]["stop"]) == ([5, 6], ["x"])
        async with asyncio.timeout(20):
            await came.wait()  # Also what was published before.
    await publisher.close()


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"kv_events": "tcp://127.0.0.1:1"}, "kv_events"),
        ({"kv_replay": "tcp://127.0.0.1:1", "tokenizer": "x"}, "kv_replay"),
        ({"tasks": "embeddings", "tokenizer": "x"}, "tokenizer"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(options, param):
    with pytest.raises(InvalidParameter) as refused:
        OpenAIEngine(url="http://127.0.0.1:1", **options)
    assert refused.value.param == param
    assert not OpenAIEngine(url="http://127.0.0.1:1").kv_events(lambda events: None)


async def test_a_tokenizer_without_a_template_answers_only_completions(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    async with served(tokenizer=str(tmp_path)) as (_, engine):
        with pytest.raises(InvalidParameter, match="leave chat out of tasks"):
            await engine.start()
    async with served(tokenizer=str(tmp_path), tasks="completions") as (_, engine):
        await engine.start()
        assert not engine.model.card.chat
