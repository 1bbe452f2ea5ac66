"""Server-sent events and lines of JSON, over real sockets."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI, Response

import triton_distributed as trd
from tests.integrations.gateway import MEMORY, TOKENS, Ask, Token, asking, browser_of, browsing, serving
from tests.runtime.cluster import patiently, until
from tests.timing import MS
from triton_distributed import fastapi as trd_fastapi

BIG = 64 * 1024


@pytest.fixture
async def here() -> AsyncIterator[trd.Connection]:
    """The worker's side."""
    async with trd.connect(MEMORY) as made:
        yield made


def gateway(**options: Any) -> FastAPI:
    """An app with one endpoint for each format."""
    app = FastAPI(lifespan=trd_fastapi.lifespan(config=MEMORY))
    trd_fastapi.install(app)

    @app.post("/sse")
    async def sse(body: Ask, here: trd_fastapi.Here) -> Response:
        return await trd_fastapi.sse(here.stream(TOKENS, body), **options)

    @app.post("/ndjson")
    async def ndjson(body: Ask, here: trd_fastapi.Here) -> Response:
        return await trd_fastapi.ndjson(here.stream(TOKENS, body))

    return app


async def count(ask: Ask) -> AsyncIterator[Token]:
    for number in range(ask.count):
        yield Token(ask.text, number)


class Worker:
    """A worker whose handler yields when the test says so.

    Args:
        first: the items that it yields at once.
    """

    def __init__(self, *first: Token) -> None:
        self.began, self.left = asyncio.Event(), asyncio.Event()
        self.items: asyncio.Queue[Token | Exception | None] = asyncio.Queue()
        for each in first:
            self.items.put_nowait(each)

    async def generate(self, ask: Ask) -> AsyncIterator[Token]:
        self.began.set()
        try:
            while (item := await self.items.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.left.set()


async def test_each_item_is_an_event(here: trd.Connection) -> None:
    await here.serve(TOKENS, count)
    async with browsing(gateway(last="[DONE]")) as browser:
        answer = await browser.post("/sse", json={"text": "a\nb", "count": 2})
    assert answer.text == ('data: {"text":"a\\nb","number":0}\n\ndata: {"text":"a\\nb","number":1}\n\ndata: [DONE]\n\n')
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-request-id"]


async def test_a_function_makes_the_events(here: trd.Connection) -> None:
    def event(token: Token) -> trd_fastapi.Event:
        return trd_fastapi.Event(token.text, event="token", id=str(token.number))

    await here.serve(TOKENS, count)
    async with browsing(gateway(event=event)) as browser:
        answer = await browser.post("/sse", json={"text": "ü", "count": 1})
    assert answer.text == "id: 0\nevent: token\ndata: ü\n\n"


async def test_lines_of_json(here: trd.Connection) -> None:
    await here.serve(TOKENS, count)
    async with browsing(gateway()) as browser:
        answer = await browser.post("/ndjson", json={"text": "a", "count": 2})
    assert answer.text == '{"text":"a","number":0}\n{"text":"a","number":1}\n'
    assert answer.headers["content-type"] == "application/x-ndjson"


async def test_an_item_leaves_when_it_comes(here: trd.Connection) -> None:
    worker = Worker()
    await here.serve(TOKENS, worker.generate)
    async with serving(gateway()) as server, asking(server, "/sse") as client:
        await client.until(b"\r\n\r\n")  # The response begins when the handler does, before an item.
        for text in ("one", "two"):
            worker.items.put_nowait(Token(text))
            assert text.encode() in await client.until(b"\n\n")
        worker.items.put_nowait(None)
        await client.until(b"0\r\n\r\n")


async def test_items_that_are_there_leave_together(here: trd.Connection) -> None:
    await here.serve(TOKENS, count)
    app = gateway()
    bodies: list[bytes] = []
    incoming: asyncio.Queue[Any] = asyncio.Queue()
    incoming.put_nowait({"type": "http.request", "body": b'{"text":"a","count":500}'})

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            bodies.append(message["body"])

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/sse", "query_string": b"", "headers": headers}
    async with app.router.lifespan_context(app):
        await patiently(app(scope, incoming.get, send))
    assert b"".join(bodies).count(b"data:") == 500
    assert len(bodies) < 50


async def test_comments_keep_an_idle_connection(here: trd.Connection) -> None:
    worker = Worker()
    await here.serve(TOKENS, worker.generate)
    async with serving(gateway(heartbeat_s=MS)) as server, asking(server, "/sse") as client:
        await client.until(b"\r\n\r\n")
        for _ in range(3):
            await client.until(b":\n\n")
        worker.items.put_nowait(Token("after"))
        await client.until(b'"after"')


@pytest.mark.parametrize("heartbeat_s", [0, -1, float("nan")])
async def test_an_invalid_interval_is_named(here: trd.Connection, heartbeat_s: float) -> None:
    with pytest.raises(ValueError, match="heartbeat_s="):
        await trd_fastapi.sse(here.stream(TOKENS, Ask("a")), heartbeat_s=heartbeat_s)


# Errors.


async def test_an_error_after_items_is_an_event_and_ends_the_stream(
    here: trd.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(Token("one"))
    worker.items.put_nowait(KeyError("secret"))
    await here.serve(TOKENS, worker.generate)
    async with browsing(gateway(last="[DONE]")) as browser:
        answer = await browser.post("/sse", json={"text": "a"}, headers={"x-request-id": "R1"})
    body = '{"status":500,"code":"remote_error","detail":"The service failed.","request_id":"R1"}'
    assert answer.status_code == 200
    assert answer.text == f'data: {{"text":"one","number":0}}\n\nevent: error\ndata: {body}\n\n'
    assert [each.levelname for each in caplog.records if each.name == "triton_distributed.http"] == ["ERROR"]


async def test_an_error_in_lines_is_a_line(here: trd.Connection) -> None:
    worker = Worker(Token("one"))
    worker.items.put_nowait(KeyError("secret"))
    await here.serve(TOKENS, worker.generate)
    async with browsing(gateway()) as browser:
        lines = (await browser.post("/ndjson", json={"text": "a"})).text.splitlines()
    assert json.loads(lines[1])["error"]["code"] == "remote_error"
    assert len(lines) == 2


async def test_a_lost_worker_is_an_event(here: trd.Connection) -> None:
    worker = Worker(Token("one"))
    await here.serve(TOKENS, worker.generate)
    async with serving(gateway(last="[DONE]")) as server, asking(server, "/sse") as client:
        await client.until(b'"one"')
        for session in list(here.runtime.worker.server.sessions):
            session._transport.abort()  # type: ignore[union-attr]
        rest = await client.until(b"0\r\n\r\n")
    assert b"event: error" in rest
    assert b'"stream_incomplete"' in rest
    assert b"[DONE]" not in rest


async def test_an_item_that_cannot_be_written_is_an_event(
    here: trd.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    def event(token: Token) -> object:
        return object() if token.number else token

    worker = Worker(Token("one"), Token("two", 1))
    await here.serve(TOKENS, worker.generate)
    async with browsing(gateway(event=event)) as browser:
        answer = await browser.post("/sse", json={"text": "a"})
        await patiently(worker.left.wait())
    assert answer.text.count("data:") == 2
    assert '"internal_error"' in answer.text
    assert [each.exc_info is not None for each in caplog.records if each.levelno >= logging.ERROR] == [True]


async def test_a_call_that_the_app_cancels_does_not_look_complete(here: trd.Connection) -> None:
    worker = Worker(Token("one"))
    await here.serve(TOKENS, worker.generate)
    app = gateway()
    streams: list[trd.ItemStream[Token]] = []

    @app.post("/kept")
    async def kept(body: Ask, here: trd_fastapi.Here) -> Response:
        streams.append(here.stream(TOKENS, body))
        return await trd_fastapi.sse(streams[0], last="[DONE]")

    async with serving(app) as server, asking(server, "/kept") as client:
        await client.until(b'"one"')
        streams[0].cancel()
        rest = await client.until(b"0\r\n\r\n")
    assert b"event: error" in rest
    assert b"[DONE]" not in rest


@pytest.mark.parametrize("path", ["/sse", "/ndjson"])
async def test_a_refusal_has_its_own_status(here: trd.Connection, path: str) -> None:
    worker = Worker()
    await here.serve(TOKENS, worker.generate, max_inflight=1)
    app = gateway()

    @app.post("/invalid")
    async def invalid(here: trd_fastapi.Here) -> Response:
        return await trd_fastapi.sse(here.stream("t.http.tokens", {"text": 5}))

    async with serving(app) as server, asking(server, path) as first, browser_of(server) as browser:
        await first.until(b"200 OK")
        refused = await browser.post(path, json={"text": "b"})
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        worker.items.put_nowait(None)
        await first.until(b"0\r\n\r\n")
        wrong = await browser.post("/invalid")
        assert (wrong.status_code, wrong.json()["code"]) == (422, "invalid_request")


async def test_streams_beyond_the_workers_places_are_refused_before_they_begin() -> None:
    release, accepted = asyncio.Event(), 0

    async def generate(ask: Ask) -> AsyncIterator[Token]:
        nonlocal accepted
        accepted += 1
        await release.wait()
        for number in range(ask.count):
            yield Token(ask.text, number)

    async with trd.connect(MEMORY) as one, trd.connect(MEMORY) as two, trd.connect(MEMORY) as three:
        for each in (one, two, three):
            await each.serve(TOKENS, generate, max_inflight=32)
        async with browsing(gateway(last="[DONE]")) as browser:
            asked = [asyncio.create_task(browser.post("/sse", json={"text": "a"})) for _ in range(150)]
            await until(lambda: sum(each.done() for each in asked) >= 54)
            assert accepted == 96
            release.set()
            answers = await patiently(asyncio.gather(*asked))
    statuses = Counter(each.status_code for each in answers)
    assert statuses == {200: 96, 503: 54}
    for answer in answers:
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) >= 1
        else:
            assert answer.text.count("data:") == 4
            assert answer.text.endswith("data: [DONE]\n\n")


# The client leaves.


def without_complaint(caplog: pytest.LogCaptureFixture) -> None:
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING] == []


async def test_it_leaves_before_the_request_is_accepted(here: trd.Connection, caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(Token("one"))
    await here.serve(TOKENS, worker.generate, max_inflight=1, max_queue=5)
    app = gateway()

    def waiting() -> int:
        return here.runtime.statistics().endpoints[0].waiting

    async with serving(app) as server, asking(server, "/sse") as first:
        await first.until(b'"one"')
        async with asking(server, "/sse") as second:
            await until(lambda: waiting() == 1)
            second.leave()
            await until(lambda: waiting() == 0)
        worker.items.put_nowait(None)
        await first.until(b"0\r\n\r\n")
    without_complaint(caplog)


async def test_it_leaves_between_items(here: trd.Connection, caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(Token("one"))
    await here.serve(TOKENS, worker.generate)
    async with serving(gateway()) as server, asking(server, "/sse") as client:
        await client.until(b'"one"')
        client.leave()
        await patiently(worker.left.wait())
    without_complaint(caplog)


@pytest.mark.parametrize("path", ["/sse", "/ndjson"])
async def test_it_leaves_while_it_does_not_read(
    here: trd.Connection, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    left, made = asyncio.Event(), 0

    async def endless(ask: Ask) -> AsyncIterator[Token]:
        nonlocal made
        try:
            while True:
                made += 1
                yield Token("x" * BIG)
        finally:
            left.set()

    await here.serve(TOKENS, endless)
    async with serving(gateway()) as server, asking(server, path, limit=1024) as client:
        connections: set[Any] = {*server.server_state.connections}
        await until(lambda: any(each.flow.write_paused for each in connections))
        assert made < 1000  # The handler stops when every buffer on the way is full.
        client.leave()
        await patiently(left.wait())
    without_complaint(caplog)


async def test_an_iterator_around_a_stream_is_closed_with_it(here: trd.Connection) -> None:
    worker = Worker(Token("one"))
    await here.serve(TOKENS, worker.generate)
    app = gateway()
    closed = asyncio.Event()

    async def words(stream: trd.ItemStream[Token]) -> AsyncIterator[str]:
        try:
            async for token in stream:
                yield token.text
                yield "|"
        finally:
            closed.set()

    @app.post("/words")
    async def of(body: Ask, here: trd_fastapi.Here) -> Response:
        stream = here.stream(TOKENS, body)
        await stream.accepted()
        return await trd_fastapi.sse(words(stream))

    async with serving(app) as server, asking(server, "/words") as client:
        await client.until(b"data: one\n\ndata: |\n\n")
        client.leave()
        await patiently(closed.wait())
        await patiently(worker.left.wait())
