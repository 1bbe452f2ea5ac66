"""The whole path in one process: the OpenAI API, an answer of `llm/models`, a worker, and the mock engine."""

from __future__ import annotations

import asyncio
import json
import random

from tests.llm.standin import StandInModels
from tests.llm.test_openai_api import HELLO, request_of
from tests.llm.test_openai_folding import folded
from triton_distributed.llm.engines.mock.engine import MockEngine
from triton_distributed.llm.http import openai_app
from triton_distributed.llm.models.prompts import Prompts, TokenizerThreads
from triton_distributed.llm.models.served import ServedModel
from triton_distributed.llm.tokens.template import ChatTemplate
from triton_distributed.llm.tokens.tokenizer import ByteTokenizer
from triton_distributed.llm.worker.serve import serve_model
from triton_distributed.testing import run_in_virtual_time
from triton_distributed.testing.network import LocalNetwork


def test_a_mock_engine_answers_and_is_free_after_a_client_left():
    async def main() -> None:
        async with LocalNetwork() as here:
            engine = MockEngine(name="org/tiny", ttft_ms="1", itl_ms="10")
            await serve_model(await here.worker(), engine)
            card = engine.model.published
            template = ChatTemplate(engine.model.template, card.template_values) if engine.model.template else None
            prompts = Prompts(card, ByteTokenizer(), template, TokenizerThreads())
            app = openai_app(StandInModels(ServedModel(here, card, prompts)))
            for number in range(5):
                chance = random.Random(number)
                body = {"model": "org/tiny", "messages": HELLO, "max_tokens": chance.randint(1, 20), "seed": number}
                body["n"] = chance.randint(1, 3)
                _, sent = await request_of(app, body)
                whole = json.loads(sent["body"])
                texts = [choice["message"]["content"] for choice in whole["choices"]]
                options = {"stream": True, "stream_options": {"include_usage": True}}
                _, *parts = await request_of(app, body | options)
                stream = folded(b"".join(each["body"] for each in parts))
                assert [choice["text"] for choice in stream["choices"]] == texts
                assert stream["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
            for streamed in (False, True):
                leave = asyncio.Event()
                body = {"model": "org/tiny", "messages": HELLO, "max_tokens": 1000, "stream": streamed, "n": 2}
                task = asyncio.create_task(request_of(app, body, leave=leave))
                while engine.metrics().active < 2 and not task.done():
                    await asyncio.sleep(0.001)
                assert not task.done(), task.result()
                leave.set()
                await task
                left = asyncio.get_running_loop().time()
                while engine.metrics().active:
                    await asyncio.sleep(0.001)
                assert asyncio.get_running_loop().time() - left < 0.1  # The answer alone would take 10 s.

    run_in_virtual_time(main())


def test_what_came_while_the_client_did_not_read_is_sent_at_once():
    async def main() -> None:
        async with LocalNetwork() as here:
            engine = MockEngine(name="org/tiny", ttft_ms="1", itl_ms="10")
            await serve_model(await here.worker(), engine)
            card = engine.model.published
            prompts = Prompts(card, ByteTokenizer(), None, TokenizerThreads())
            app = openai_app(StandInModels(ServedModel(here, card, prompts)))
            options = {"stream": True, "stream_options": {"include_usage": True}}
            for n, most in ((1, 2), (2, 45)):  # Several answers share a queue of one delta for each.
                body = {"model": "org/tiny", "prompt": "hello", "max_tokens": 40, "n": n, "seed": 1}
                _, whole = await request_of(app, body, path="/v1/completions")
                _, *lone = await request_of(app, body | options, path="/v1/completions")
                assert len(lone) >= 40  # No chunk waits for the next one.
                _, first, *later = await request_of(app, body | options, path="/v1/completions", pause_s=9)
                assert len(later) <= most
                texts = [
                    each["text"] for each in folded(first["body"] + b"".join(each["body"] for each in later))["choices"]
                ]
                assert texts == [each["text"] for each in json.loads(whole["body"])["choices"]]

    run_in_virtual_time(main())
