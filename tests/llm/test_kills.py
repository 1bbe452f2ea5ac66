"""Answers of real worker processes that are killed with SIGKILL: every text is that of an undisturbed answer."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import msgspec
import pytest

import triton_distributed as trd
from tests.runtime.cluster import patiently, until
from tests.runtime.programs import program
from triton_distributed.llm import Request, Sampling
from triton_distributed.llm.engines.mock.engine import MockEngine
from triton_distributed.llm.models.prompts import Prompts, TokenizerThreads
from triton_distributed.llm.models.served import ServedModel
from triton_distributed.llm.tokens.tokenizer import ByteTokenizer

STREAMS, TOKENS = 60, 60
ITL_MS = 15

WORKER = f"""
import asyncio
import triton_distributed as trd
from triton_distributed.llm import Output, Request
from triton_distributed.llm.engines.mock.engine import MockEngine

async def main():
    engine = MockEngine(itl_ms={ITL_MS}, answer_tokens=0)
    async with trd.connect() as here:
        name = f"models.{{engine.model.published.component}}.generate"
        served = await here.serve(trd.Stream[Request, Output](name), engine.generate, max_inflight=engine.slots)
        print("ready", flush=True)
        await served.until_drained()

asyncio.run(main())
"""


async def undisturbed(request: Request) -> list[int]:
    engine = MockEngine(answer_tokens=0)
    return [each async for output in engine.generate(request) for each in output.token_ids]


@pytest.mark.leaves("socket files", reason="a killed process cannot remove its own; the next worker does")
async def test_every_answer_is_whole_when_workers_are_killed(trd_dir: Path, tmp_path: Path) -> None:
    card = MockEngine(itl_ms=ITL_MS, answer_tokens=0).model.published
    prompts = Prompts(card, ByteTokenizer(), None, TokenizerThreads())
    async with (
        program(tmp_path, WORKER) as first,
        program(tmp_path, WORKER) as second,
        program(tmp_path, WORKER),
        trd.connect() as here,
    ):
        model = ServedModel(here, card, prompts)
        await here.wait_for_instances(f"models.{card.component}.generate", 3, timeout=15)
        texts = [""] * STREAMS
        losses = 0

        async def read(at: int) -> None:
            nonlocal losses
            prompt = await prompts.text(f"prompt number {at}")
            sampling = Sampling(temperature=0 if at % 2 else 1, seed=at)
            request = Request(max_tokens=TOKENS, sampling=sampling)
            answer = model.answer(prompt, request)
            async for delta in answer:
                texts[at] += delta.text
                if delta.usage is not None:
                    assert delta.usage.completion_tokens == TOKENS
                    assert delta.usage.prompt_tokens == prompt.tokens
            losses += answer.losses
            expected = await undisturbed(msgspec.structs.replace(request, prompt=prompt.ids))
            assert texts[at] == bytes(expected).decode()

        reading = [asyncio.create_task(read(at)) for at in range(STREAMS)]
        await until(lambda: all(len(each) > 10 for each in texts))
        first.signal(signal.SIGKILL)
        await until(lambda: all(len(each) > 30 for each in texts))
        second.signal(signal.SIGKILL)
        await patiently(asyncio.gather(*reading))
        assert losses >= STREAMS // 3
        await first.ended()
        await second.ended()
