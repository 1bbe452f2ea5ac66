"""Requests that our own server answers without ASGI between get what they would get over ASGI."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx
import pytest

import triton_distributed as trd
from tests.llm.standin import StandIn, StandInModels, echo
from tests.timing import MS, PATIENCE_S
from triton_distributed.llm.contract.output import Usage
from triton_distributed.llm.http import connections, openai_app
from triton_distributed.llm.http import serve as serving
from triton_distributed.llm.http.direct import Direct
from triton_distributed.llm.http.exchange import Exchange
from triton_distributed.llm.http.front import FrontEnd, front_end
from triton_distributed.llm.models.delta import Delta

CHAT = {"model": "org/tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
LOG = "triton_distributed.llm.http.access"


class Server:
    """A front end with one model, over a socket and as an ASGI app."""

    def __init__(self, app: FrontEnd, model: StandIn, port: int) -> None:
        self.app, self.model, self.port = app, model, port

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def served(answers: Any = echo, drain_timeout_s: float = 10, **options: Any) -> AsyncIterator[Server]:
    model = StandIn(answers)
    async with trd.connect(trd.Config(discovery="memory", handle_signals=False)) as here:
        app = await front_end(here, **{"openai": openai_app(StandInModels(model)), **options})
        ready, listening = asyncio.Event(), serving.listen("127.0.0.1", 0)
        port = listening.getsockname()[1]
        serves = serving.serve(app, listening, drain_timeout_s=drain_timeout_s, ready=lambda _: ready.set())
        server = asyncio.create_task(serves)
        async with asyncio.timeout(PATIENCE_S):
            await ready.wait()
            yield Server(app, model, port)
            if not app.draining:
                os.kill(os.getpid(), signal.SIGTERM)
            await server


def request(body: Any, path: str = "/v1/chat/completions", more: str = "") -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(raw)}\r\n{more}\r\n"
    return head.encode() + raw


async def whole(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """The head and the body of a response."""
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 100 " in head:
        head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return head, await reader.readexactly(length)


def told(response: httpx.Response) -> tuple[int, dict[str, str], str]:
    """What a response says, without ids and times."""
    headers = {name: value for name, value in response.headers.items() if name not in ("x-request-id", "date")}
    headers.pop("transfer-encoding", None)
    text = "data: " if "data: " in response.text else ""
    for line in response.text.split("data: "):
        if line.startswith("{"):
            line = json.dumps(json.loads(line) | {"id": "", "created": 0})
        text += line
    if "data: " in text:
        headers.pop("content-length", None)
    elif "chatcmpl" in response.text or "cmpl-" in response.text:
        assert int(headers.pop("content-length")) == len(response.content)
    return response.status_code, headers, text


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the requests that were answered without ASGI."""
    found: list[str] = []

    def noted(path: str, *others: Any) -> Direct:
        found.append(path)
        return Direct(path, *others)

    monkeypatch.setattr(connections, "Direct", noted)
    return found


async def test_the_answers_are_those_of_asgi(direct: list[str]) -> None:
    completion = {"model": "org/tiny", "prompt": "hello", "max_tokens": 4}
    asked: list[tuple[str, Any, dict[str, str]]] = [
        ("chat/completions", CHAT, {}),
        ("chat/completions", CHAT | {"stream": True, "stream_options": {"include_usage": True}}, {}),
        ("chat/completions", CHAT | {"n": 3}, {"x-request-id": "mine"}),
        ("chat/completions", CHAT | {"temperature": 9}, {}),
        ("chat/completions", CHAT | {"model": "other", "stream": True}, {}),
        ("completions", completion, {}),
        ("completions", completion | {"stream": True, "echo": True}, {}),
        ("embeddings", {"model": "org/tiny", "input": "hello"}, {}),
        ("chat/completions", b"{", {}),
        ("chat/completions", CHAT, {"authorization": "Bearer wrong"}),
        ("chat/completions", CHAT, {"x-trd-explain": "only"}),
    ]
    key = {"authorization": "Bearer key"}
    async with served(keys=["key"]) as server:
        over = httpx.AsyncClient(transport=httpx.ASGITransport(server.app), base_url="http://x", headers=key)
        async with over, httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", headers=key) as http:
            for path, body, headers in asked:
                given: Any = {"content": body} if isinstance(body, bytes) else {"json": body}
                first = await over.post(f"/v1/{path}", headers=headers, **given)
                second = await http.post(f"/v1/{path}", headers=headers, **given)
                assert told(second) == told(first)
                assert "date" in second.headers
                assert (second.headers["x-request-id"] == "mine") == bool(headers.get("x-request-id"))
            page = (await http.get("/metrics")).text
        assert not server.app.running
        assert not server.model.running
    assert direct == [f"/v1/{path}" for path, _, _ in asked]
    for status, count in ((200, 2 * 3), (400, 2 * 2), (401, 2), (404, 2 * 2)):
        labels = f'route="/v1/chat/completions",status="{status}"'
        counted = [line.rpartition(" ")[2] for line in page.splitlines() if labels in line and "_total{" in line]
        assert sum(map(float, counted)) == count


async def test_a_connection_serves_bodies_in_parts_pipelined_requests_and_other_kinds(direct: list[str]) -> None:
    ask = request(CHAT)
    chunked = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    raw = json.dumps(CHAT).encode()
    async with served() as server, server.connected() as (reader, writer):
        for count in range(4, len(ask), 60):
            writer.write(ask[:count])
            await asyncio.sleep(1 * MS)  # Two reads of the server, most likely.
            writer.write(ask[count:])
            head, body = await whole(reader)
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert json.loads(body)["choices"][0]["message"]["content"]
        answered = len(direct)
        writer.write(request(CHAT | {"max_tokens": 1}) + request(CHAT | {"max_tokens": 2}) + request({"model": "no"}))
        usages = [json.loads((await whole(reader))[1]) for _ in range(3)]
        assert [each.get("usage", {}).get("completion_tokens") for each in usages] == [1, 2, None]
        for other in (
            chunked + b"%x\r\n%b\r\n0\r\n\r\n" % (len(raw), raw),
            request(CHAT, "/v1/chat/completions?x=1"),
            request(CHAT, more="expect: 100-continue\r\n"),
            request(CHAT | {"user": "u" * 70_000}),
        ):
            writer.write(other)
            head, body = await whole(reader)
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert len(direct) == answered + 1
        writer.write(request(CHAT, more="connection: close\r\n"))
        head, _ = await whole(reader)
        assert b"connection: close\r\n" in head
        assert await reader.read() == b""


async def test_an_idle_connection_is_closed_and_one_in_use_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "KEEP_ALIVE_S", 50 * MS)
    monkeypatch.setattr(serving, "LOOK_TICKS", 1)
    go_on = asyncio.Event()

    async def slow(prompt: Any, request: Any) -> AsyncGenerator[Delta]:
        if request.max_tokens == 2:
            await go_on.wait()
        yield Delta(text="a", token_ids=[1], finish_reason="stop", usage=Usage(1, 1))

    async with served(slow) as server, server.connected() as (idle, writer), server.connected() as (used, other):
        writer.write(request(CHAT))
        await whole(idle)
        other.write(request(CHAT))
        await whole(used)
        other.write(request(CHAT | {"max_tokens": 2}))
        while not server.model.running:
            await asyncio.sleep(1 * MS)
        assert await idle.read() == b""
        go_on.set()
        assert (await whole(used))[0].startswith(b"HTTP/1.1 200 ")
        assert await used.read() == b""


async def test_a_request_that_asks_for_another_protocol_is_answered_over_this_one(direct: list[str]) -> None:
    java = "connection: Upgrade, HTTP2-Settings\r\nhttp2-settings: AAEAAEAAAAIAAAAB\r\nupgrade: h2c\r\n"
    raw = json.dumps(CHAT).encode()
    chunked = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n{java}transfer-encoding: chunked\r\n\r\n".encode()
    chunked += b"%x\r\n%b\r\n0\r\n\r\n" % (len(raw), raw)
    other = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n{java}content-length: 1x\r\n\r\n".encode()
    async with served() as server, server.connected() as (reader, writer):
        for asked in (request(CHAT, more=java), chunked, request(CHAT | {"user": "u" * 70_000}, more=java)):
            for count in (60, len(asked) - len(raw) - 9, len(asked)):
                writer.write(asked[:count])
                await asyncio.sleep(1 * MS)
                writer.write(asked[count:])
                head, body = await whole(reader)
                assert head.startswith(b"HTTP/1.1 200 OK\r\n")
                assert json.loads(body)["usage"]["completion_tokens"] == 5
        assert len(direct) == 3
        writer.write(request(CHAT, more=java) * 3 + b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        for _ in range(4):
            head, _ = await whole(reader)
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        writer.write(other)
        head, _ = await whole(reader)
        assert head.startswith(b"HTTP/1.1 400 ")
        assert await reader.read() == b""


async def test_a_client_that_leaves_ends_its_request_at_once(caplog: pytest.LogCaptureFixture) -> None:
    begun = asyncio.Event()

    async def endless(prompt: Any, request: Any) -> AsyncGenerator[Delta]:
        yield Delta(text="begun", token_ids=[1])
        begun.set()
        await asyncio.Event().wait()

    caplog.set_level(logging.INFO, LOG)
    async with served(endless) as server:
        for sent in (request(CHAT)[:-9], request(CHAT), request(CHAT | {"stream": True})):
            begun.clear()
            async with server.connected() as (_, writer):
                writer.write(sent)
                while not (begun.is_set() if sent.endswith(b"}") else server.app.running):
                    await asyncio.sleep(1 * MS)
            while server.app.running:
                await asyncio.sleep(1 * MS)
            assert not server.model.running
        lines = [each.message for each in caplog.records if each.name == LOG]
    assert [line.split()[3] for line in lines] == ["499"] * 3
    assert all("error=client_left" in line for line in lines)
    assert not [each for each in caplog.records if each.exc_info]


async def test_the_drain_cuts_off_a_request_whose_body_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "LINGER_S", 10 * MS)
    async with served(drain_timeout_s=50 * MS) as server, server.connected() as (reader, writer):
        writer.write(request(CHAT)[:-5])
        while not server.app.running:
            await asyncio.sleep(1 * MS)
        os.kill(os.getpid(), signal.SIGTERM)
        head, body = await whole(reader)
        assert head.startswith(b"HTTP/1.1 503 ")
        assert json.loads(body)["error"]["code"] == "unavailable"


async def test_a_stream_that_cannot_tell_its_error_leaves_nothing() -> None:
    failed = asyncio.Event()

    async def fails(prompt: Any, request: Any) -> AsyncGenerator[Delta]:
        yield Delta(text="x" * 8_000_000, token_ids=[1])  # More than the sockets hold.
        failed.set()
        raise RuntimeError("the engine")

    app = openai_app(StandInModels(StandIn(fails)))
    async with served(openai=app) as server:
        async with server.connected() as (_, writer):
            writer.write(request(CHAT | {"stream": True}))
            await failed.wait()
            await asyncio.sleep(0)
            assert server.app.running  # It waits for the client, to tell it of the error.
        while server.app.running:
            await asyncio.sleep(1 * MS)
    assert not app._heartbeat._streams


async def test_the_limit_of_the_api_holds_if_that_of_the_server_is_larger(direct: list[str]) -> None:
    app = openai_app(StandInModels(StandIn(echo)), max_body_bytes=200)
    async with served(openai=app) as server, server.connected() as (reader, writer):
        for path in ("/v1/chat/completions", "/v1/chat/completions?x=1"):
            writer.write(request(CHAT | {"user": "u" * 200}, path))
            head, body = await whole(reader)
            assert head.startswith(b"HTTP/1.1 413 ")
            assert json.loads(body)["error"]["code"] == "request_too_large"
    assert len(direct) == 1


class Broken:
    """Stands in for the OpenAI API, with a defect."""

    async def answer(self, exchange: Exchange) -> None:
        raise ValueError("a defect")


async def test_a_defect_is_logged_and_answered(caplog: pytest.LogCaptureFixture) -> None:
    async with served(openai=Broken()) as server, server.connected() as (reader, writer):
        writer.write(request(CHAT))
        head, body = await whole(reader)
        assert head.startswith(b"HTTP/1.1 500 ")
        assert b"connection: close" in head
        assert body == b"Internal Server Error"
    assert "ValueError: a defect" in caplog.text
