"""The server of the front end: no request fails because it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import random
import signal
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

import triton_distributed as trd
from tests.llm.standin import StandIn, StandInModels
from tests.timing import MS, PATIENCE_S
from triton_distributed.llm.http import connections, openai_app
from triton_distributed.llm.http import serve as serving
from triton_distributed.llm.http.front import front_end
from triton_distributed.llm.http.limits import MAX_HEAD_BYTES
from triton_distributed.llm.models.delta import Delta

CLIENTS = 40
_pauses = random.Random(40)


class App:
    """Answers after a moment, or with a stream of two parts."""

    draining = False
    running = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(_pauses.random() * 2 * MS)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/stream":
            await send({"type": "http.response.body", "body": b"begun", "more_body": True})
            await asyncio.sleep(_pauses.random() * 20 * MS)
        await send({"type": "http.response.body", "body": b"done"})


class Client:
    """Sends one request after the other, most of them on a connection that it keeps."""

    def __init__(self, port: int, kept: bool) -> None:
        self.port, self.kept, self.answered = port, kept, 0
        self.refused = False  # The server accepts no connection: nothing was sent.

    async def run(self) -> None:
        while not self.refused:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except ConnectionError:
                self.refused = True
                return
            try:
                while await self._ask(reader, writer):
                    await asyncio.sleep(_pauses.random() * 5 * MS)
            finally:
                writer.close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        path = _pauses.choice(["/whole", "/stream"])
        writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")  # IncompleteReadError: the request was reset.
        assert head.startswith(b"HTTP/1.1 200 ")
        await reader.readuntil(b"0\r\n\r\n")
        self.answered += 1
        return self.kept and b"connection: close" not in head


async def test_no_request_fails_because_the_server_ends(monkeypatch):
    monkeypatch.setattr(serving, "LINGER_S", 200 * MS)
    app, listening = App(), serving.listen("127.0.0.1", 0)
    ready, threshold = asyncio.Event(), gc.get_threshold()
    options: dict[str, Any] = {"drain_timeout_s": 10, "ready": lambda _: ready.set()}
    server = asyncio.create_task(serving.serve(app, listening, **options))  # type: ignore[arg-type]
    await ready.wait()
    assert gc.get_threshold() > threshold
    port = listening.getsockname()[1]
    idle = await asyncio.open_connection("127.0.0.1", port)
    clients = [Client(port, kept=bool(number % 4)) for number in range(CLIENTS)]
    running = [asyncio.create_task(each.run()) for each in clients]
    async with asyncio.timeout(PATIENCE_S):
        while min(each.answered for each in clients) < 3:
            await asyncio.sleep(1 * MS)
        before = sum(each.answered for each in clients)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.gather(*running)
        await server
        assert app.draining
        assert sum(each.answered for each in clients) > before + CLIENTS, "requests after the signal are answered"
        assert await idle[0].read() == b""
        assert gc.get_threshold() == threshold
    idle[1].close()


async def test_a_stream_that_began_before_the_signal_ends_whole_and_its_connection_serves_once_more(monkeypatch):
    app, listening = App(), serving.listen("127.0.0.1", 0)
    go_on, ready = asyncio.Event(), asyncio.Event()

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        await go_on.wait()
        await send({"type": "http.response.body", "body": b"done"})

    monkeypatch.setattr(App, "__call__", staticmethod(answer))
    options: dict[str, Any] = {"drain_timeout_s": 10, "ready": lambda _: ready.set()}
    server = asyncio.create_task(serving.serve(app, listening, **options))  # type: ignore[arg-type]
    await ready.wait()
    port = listening.getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(PATIENCE_S):
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"connection: close" not in await reader.readuntil(b"begun\r\n")
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(ConnectionRefusedError):
            while True:
                _, other = await asyncio.open_connection("127.0.0.1", port)
                other.close()
        go_on.set()
        await reader.readuntil(b"done\r\n0\r\n\r\n")
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"connection: close" in await reader.readuntil(b"begun\r\n")
        assert (await reader.read()).endswith(b"done\r\n0\r\n\r\n")
        await server
    writer.close()


@pytest.mark.any_loop
@pytest.mark.parametrize(
    "begin",
    [
        b"GET / HTTP/1.1\r\nx: ",
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1;x=",
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nx: ",
    ],
    ids=["head", "extension", "trailer"],
)
async def test_what_comes_beside_a_body_is_bounded(begin):
    app, listening = App(), serving.listen("127.0.0.1", 0)
    ready = asyncio.Event()
    options: dict[str, Any] = {"drain_timeout_s": 1, "ready": lambda _: ready.set()}
    server = asyncio.create_task(serving.serve(app, listening, **options))  # type: ignore[arg-type]
    await ready.wait()
    port = listening.getsockname()[1]
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(ConnectionError):
            writer.write(begin + b"a" * 16 * MAX_HEAD_BYTES)  # A part that comes with the head does not count.
            while await reader.read(1000):
                pass
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (4 * MAX_HEAD_BYTES, b"a" * 4 * MAX_HEAD_BYTES)
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + body)
        await reader.readuntil(b"done\r\n0\r\n\r\n")
        writer.close()
        os.kill(os.getpid(), signal.SIGTERM)
        await server


@pytest.mark.any_loop
async def test_a_client_that_sends_too_slowly_loses_its_connection_and_one_that_waits_does_not(monkeypatch):
    monkeypatch.setattr(connections, "UNSENT_S", 200 * MS)
    monkeypatch.setattr(serving, "LOOK_TICKS", 1)
    app, listening = App(), serving.listen("127.0.0.1", 0)
    go_on, ready = asyncio.Event(), asyncio.Event()

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        if scope["path"] == "/long":
            await go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"done"})

    monkeypatch.setattr(App, "__call__", staticmethod(answer))
    options: dict[str, Any] = {"drain_timeout_s": 10, "ready": lambda _: ready.set()}
    server = asyncio.create_task(serving.serve(app, listening, **options))  # type: ignore[arg-type]
    await ready.wait()
    whole, half = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"GET / HTTP/1.1\r\nhost:"
    body = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nhalf"
    long = whole.replace(b"/ ", b"/long ", 1)
    sent = [b"", half, body, whole, whole + half, long, long + half]
    async with asyncio.timeout(PATIENCE_S):
        both = [await asyncio.open_connection("127.0.0.1", listening.getsockname()[1]) for _ in sent]
        for (_, writer), each in zip(both, sent, strict=True):
            writer.write(each)
        answered = await both[3][0].readuntil(b"done")
        both[3][1].write(b"\r\n")
        silent, head, body, line, second, *_ = [await reader.read() for reader, _ in both[:5]]
        assert silent == b""
        assert head.startswith(b"HTTP/1.1 408 ")
        assert body == head
        assert line == b""
        assert second == answered + head
        go_on.set()
        for reader, _ in both[5:]:
            assert (await reader.readuntil(b"done")).startswith(b"HTTP/1.1 200 ")
        os.kill(os.getpid(), signal.SIGTERM)
        await server
    for _, writer in both:
        writer.close()


async def test_what_the_drain_cuts_off_ends_with_an_error_that_the_client_can_read(monkeypatch, caplog):
    monkeypatch.setattr(serving, "LINGER_S", 10 * MS)
    both = asyncio.Event()

    async def endless(prompt: Any, request: Any) -> AsyncGenerator[Delta]:
        yield Delta(text="begun", token_ids=[1])
        if len(model.running) == 2:
            both.set()
        await asyncio.Event().wait()

    model = StandIn(endless)
    async with trd.connect(trd.Config(discovery="memory", handle_signals=False)) as here:
        app = await front_end(here, openai=openai_app(StandInModels(model)))
        url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        listening = serving.listen("127.0.0.1", 0)
        serves = serving.serve(app, listening, drain_timeout_s=50 * MS, ready=url.set_result)
        caplog.set_level(logging.INFO, "triton_distributed.llm.http.access")
        server = asyncio.create_task(serves)
        async with asyncio.timeout(PATIENCE_S), httpx.AsyncClient(base_url=await url) as http:
            body = {"model": "org/tiny", "messages": [{"role": "user", "content": "x"}]}
            asked = [
                asyncio.create_task(http.post("/v1/chat/completions", json=body | {"stream": stream}))
                for stream in (True, False)
            ]
            await both.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            stream, whole = await asyncio.gather(*asked)
            await server
    *events, last = stream.text.strip().split("\n\n")
    assert '"content":"begun"' in events[-1]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["code"] == "unavailable"
    assert "The server ends" in error["message"]
    assert (whole.status_code, whole.json()["error"]["code"]) == (503, "unavailable")
    assert whole.headers["retry-after"] == "1"
    assert not model.running
    lines = [each.message for each in caplog.records if each.name == "triton_distributed.llm.http.access"]
    assert sorted(line.split()[3] for line in lines) == ["200", "503"]
    assert all("error=unavailable" in line for line in lines)
    assert not [each for each in caplog.records if each.exc_info]
