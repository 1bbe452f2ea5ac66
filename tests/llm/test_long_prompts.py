"""Long prompts, clients that leave and clients that do not read: what the loop and the memory of a front end see."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import socket
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator

import httpx
import pytest

import triton_distributed as trd
from tests.llm.standin import TEMPLATE, StandIn, StandInModels, echo
from tests.llm.test_openai_api import request_of
from tests.llm.test_openai_server import serving
from triton_distributed.errors import Overloaded
from triton_distributed.llm.contract.request import Request
from triton_distributed.llm.engines.mock.engine import MockEngine
from triton_distributed.llm.http import openai_app
from triton_distributed.llm.http import serve as serve_module
from triton_distributed.llm.http.front import front_end
from triton_distributed.llm.http.serve import listen, serve
from triton_distributed.llm.models.delta import Delta
from triton_distributed.llm.models.models import Models
from triton_distributed.llm.models.prompts import Prompt, Prompts, TokenizerThreads
from triton_distributed.llm.tokens.template import ChatTemplate
from triton_distributed.llm.tokens.tokenizer import ByteTokenizer
from triton_distributed.llm.worker.serve import serve_model

LONG = "x" * 5_000


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)


class Gated(ByteTokenizer):
    """Tokenizes a text when the test lets it, and notes which texts it got."""

    def __init__(self) -> None:
        self.begun, self.gate = threading.Semaphore(0), threading.Semaphore(0)
        self.texts: list[str] = []

    def encode(self, text: str, *, add_special_tokens: bool) -> bytes:
        self.texts.append(text)
        self.begun.release()
        self.gate.acquire()
        return super().encode(text, add_special_tokens=add_special_tokens)


@contextlib.asynccontextmanager
async def gated(**limits: float) -> AsyncIterator[tuple[StandIn, Gated]]:
    model, tokenizer, threads = StandIn(echo, context_tokens=100_000), Gated(), TokenizerThreads(**limits)
    model.prompts = Prompts(model.card, tokenizer, ChatTemplate(TEMPLATE, {}), threads)
    try:
        yield model, tokenizer
    finally:
        tokenizer.gate.release(100)
        threads.close()


def ask(client: socket.socket, address: tuple[str, int], body: dict[str, object]) -> None:
    """Send a request on a connection whose answer has a small buffer."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    client.connect(address)
    raw = json.dumps(body).encode()
    client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw)


def chat(text: str) -> dict[str, object]:
    return {"model": "org/tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 3}


async def test_the_loop_of_a_front_end_is_watched():
    async with trd.connect(trd.Config(discovery="memory", handle_signals=False)) as here:
        await front_end(here)
        while not sum(here.runtime.loop_stats.lag):
            await asyncio.sleep(0)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no TCP_USER_TIMEOUT")
@pytest.mark.any_loop
async def test_a_client_that_takes_nothing_for_long_is_cut_off(monkeypatch):
    monkeypatch.setattr(serve_module, "UNREAD_S", 0.2)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    left = asyncio.Event()

    async def endless(prompt: Prompt, request: Request) -> AsyncGenerator[Delta]:
        try:
            while True:
                yield Delta(text="x" * 1_000, token_ids=[97])
        finally:
            left.set()

    listening = listen("127.0.0.1", 0)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
    async with trd.connect(trd.Config(discovery="memory", handle_signals=False)) as here:
        app = await front_end(here, openai=openai_app(StandInModels(StandIn(endless))), access_log=False)
        server = asyncio.create_task(serve(app, listening, drain_timeout_s=1))
        with socket.socket() as slow:
            ask(slow, listening.getsockname(), chat("hi") | {"stream": True})
            await left.wait()
        server.cancel()
        await asyncio.wait([server])


async def test_a_server_has_no_long_garbage_collections_and_no_long_waits_for_threads(monkeypatch):
    steps: list[object] = []
    monkeypatch.setattr(gc, "freeze", lambda: steps.append("frozen"))
    started, usual_s = asyncio.Event(), sys.getswitchinterval()

    def ready(url: str) -> None:
        steps.append(sys.getswitchinterval())
        started.set()

    async with trd.connect(trd.Config(discovery="memory", handle_signals=False)) as here:
        app = await front_end(here)
        server = asyncio.create_task(serve(app, listen("127.0.0.1", 0), drain_timeout_s=1, ready=ready))
        await started.wait()
        server.cancel()
        await asyncio.wait([server])
    assert steps == ["frozen", pytest.approx(0.0005)]
    assert sys.getswitchinterval() == usual_s


@pytest.mark.parametrize(("processors", "expected"), [(1, 1), (2, 1), (3, 2), (64, 4)])
async def test_a_processor_stays_free_for_the_loop(monkeypatch, processors, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)), raising=False)
    threads = TokenizerThreads()
    gate, running = threading.Event(), threading.Semaphore(0)

    def wait() -> None:
        running.release()
        gate.wait()

    try:
        work = [asyncio.create_task(threads.run(wait)) for _ in range(expected + 1)]
        await asyncio.sleep(0)
        for _ in range(expected):
            assert await asyncio.to_thread(running.acquire, timeout=60)
        assert not running.acquire(blocking=False)
        gate.set()
        await asyncio.gather(*work)
    finally:
        gate.set()
        threads.close()


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("3", "3")])
async def test_fastokens_makes_no_threads_besides_ours(monkeypatch, given, expected):
    monkeypatch.setenv("FASTOKENS_BPE_THREADS", "")  # So that it is as before after the test.
    monkeypatch.delenv("FASTOKENS_BPE_THREADS")
    if given is not None:
        monkeypatch.setenv("FASTOKENS_BPE_THREADS", given)
    threads = TokenizerThreads()
    assert await threads.run(lambda: os.environ["FASTOKENS_BPE_THREADS"]) == expected
    threads.close()


async def test_a_prompt_that_would_wait_too_long_is_refused(one_thread):
    async with gated(longest_wait_s=0) as (model, tokenizer):
        app = openai_app(StandInModels(model))
        tokenizer.gate.release()
        await request_of(app, chat(LONG))  # How long a prompt takes is known from now on.
        assert tokenizer.begun.acquire(timeout=60)
        first = asyncio.create_task(request_of(app, chat(LONG)))
        assert await asyncio.to_thread(tokenizer.begun.acquire, timeout=60)
        start, body = await request_of(app, chat(LONG))
        assert start["status"] == 503
        assert int(dict(start["headers"])[b"retry-after"]) >= 1
        assert json.loads(body["body"])["error"]["code"] == "overloaded"
        with pytest.raises(Overloaded, match="long prompts wait for a thread: 1"):
            await model.prompts.text(LONG)
        tokenizer.gate.release(3)
        assert (await model.prompts.text("short")).tokens == 5
        assert (await first)[0]["status"] == 200
        assert (await request_of(app, chat(LONG)))[0]["status"] == 200


async def test_nothing_is_done_for_a_client_that_leaves_while_its_body_is_read():
    model = StandIn(echo)
    incoming = [
        {"type": "http.request", "body": json.dumps(chat("hi")).encode()[:-1], "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[object] = []

    async def receive():
        return incoming.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    await openai_app(StandInModels(model))(scope, receive, send)
    assert not sent
    assert not model.asked


async def test_nothing_is_done_for_a_client_that_leaves_before_its_prompt_is_made(one_thread):
    async with gated() as (model, tokenizer):
        app = openai_app(StandInModels(model))
        left = [asyncio.Event(), asyncio.Event()]
        tokenized, waiting = (
            asyncio.create_task(request_of(app, chat(name + LONG), leave=leave))
            for name, leave in zip(("first", "second"), left, strict=True)
        )
        assert await asyncio.to_thread(tokenizer.begun.acquire, timeout=60)
        for leave, task in zip(reversed(left), (waiting, tokenized), strict=True):
            leave.set()
            assert not await task  # It ends now, although the thread is still at work.
        tokenizer.gate.release(2)
        assert (await request_of(app, chat("third" + LONG)))[0]["status"] == 200
        assert [each.partition(":")[2][:5] for each in tokenizer.texts] == ["first", "third"]
        assert len(model.asked) == 1


@pytest.mark.any_loop
async def test_a_client_that_does_not_read_holds_up_its_own_answer_only():
    engine = MockEngine(name="org/tiny", answer_tokens=0, context_tokens=10_000_000, tokens_per_output=20)
    config = trd.Config(discovery="memory", handle_signals=False, window_bytes=8_192)
    async with trd.connect(config) as here, Models(here) as models:
        await serve_model(here, engine)
        await models.wait_for("org/tiny", 60)
        async with (
            serving(openai_app(models), send_buffer=4_096) as url,
            httpx.AsyncClient(base_url=url, timeout=60) as http,
        ):
            with socket.socket() as slow:
                address = "127.0.0.1", int(url.rpartition(":")[2])
                ask(slow, address, chat("hi") | {"stream": True, "max_tokens": 5_000_000})
                made = unchanged = 0
                while unchanged < 2_000 or not made:  # More turns than a whole window has outputs.
                    await asyncio.sleep(0)
                    before, made = made, engine.metrics().generated_tokens
                    unchanged = unchanged + 1 if made == before else 0
                    assert made < 100_000  # Without a limit it would make 5,000,000.
                answer = await http.post("/v1/chat/completions", json=chat("hi") | {"max_tokens": 2_000})
                assert answer.json()["usage"]["completion_tokens"] == 2_000
                assert engine.metrics().generated_tokens == made + 2_000
                assert engine.metrics().active == 1
            while engine.metrics().active:
                await asyncio.sleep(0)
