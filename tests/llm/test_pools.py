"""A prefill and a decode worker as processes, behind the front end: long prompts, callers that leave, and a kill."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import triton_distributed as trd
from tests.runtime.cluster import patiently, until
from tests.runtime.programs import program
from triton_distributed.cli import route
from triton_distributed.llm import Models, Request, packed
from triton_distributed.llm.engines.mock.engine import MockEngine
from triton_distributed.llm.http import openai_app
from triton_distributed.llm.routing import split

WORKER = """
import asyncio
import sys
import triton_distributed as trd
from triton_distributed.llm import serve_model
from triton_distributed.llm.engines.mock.engine import MockEngine

async def main():
    async with trd.connect() as here:
        serving = await serve_model(here, MockEngine(role=sys.argv[1], prefill_token_ms=0.03, itl_ms=30, answer_tokens=0))
        print(serving.instance.id, flush=True)
        await serving.until_drained()

asyncio.run(main())
"""
LETTERS = 20_000  # Tokens, too: 0.6 s of prefill.


def asked(first: str, **fields: Any) -> dict[str, Any]:
    return {"model": "mock", "prompt": first * LETTERS, "max_tokens": 8, "temperature": 0, **fields}


async def undisturbed(body: dict[str, Any]) -> str:
    request = Request(prompt=packed(list(body["prompt"].encode())), max_tokens=body["max_tokens"])
    engine = MockEngine(answer_tokens=0)
    return bytes([each async for output in engine.generate(request) for each in output.token_ids]).decode()


@pytest.mark.leaves("socket files", reason="a killed process cannot remove its own; the next worker does")
async def test_a_long_prompt_is_computed_by_the_prefill_worker_as_long_as_that_lives(
    trd_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split, "OTHERS", 100.0)  # A long prompt is handed over, however long things take.
    async with (
        program(tmp_path, WORKER, "decode") as decode,
        program(tmp_path, WORKER, "prefill") as prefill,
        trd.connect() as here,
        Models(here) as models,
    ):
        ids = {"decode": await decode.line(), "prefill": await prefill.line()}
        model = await models.wait_for("mock", 15)
        routed = model.routed
        assert routed is not None
        await until(lambda: sum(each.watched for each in routed.states()) == 2)

        def state(role: str) -> Any:
            return next(each for each in routed.states() if str(each.instance_id) == ids[role])

        transport = httpx.ASGITransport(openai_app(models))
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as http:

            async def post(body: dict[str, Any], explain: str = "1") -> httpx.Response:
                return await http.post("/v1/completions", json=body, headers={"x-trd-explain": explain})

            other = model.answer(await model.prompts.text("other"), Request(max_tokens=50_000))
            await anext(other)  # It is delayed by each prefill of the decode worker.

            only = (await post(asked("a"), "only")).json()
            assert (only["chosen"], only["prefill"]) == (ids["decode"], ids["prefill"])
            assert "prefill workers" in route.shown(only)
            answer = await patiently(post(asked("a")))
            found, told = answer.json(), json.loads(answer.headers["x-trd-route"])
            assert (told["chosen"], told["prefill"]) == (ids["decode"], ids["prefill"])
            assert found["choices"][0]["text"] == await undisturbed(asked("a"))
            assert (found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"]) == (LETTERS, 8)
            assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            again = (await patiently(post(asked("a", max_tokens=9)))).json()
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == LETTERS // 64 * 64, (
                "both workers have it"
            )
            assert (routed.counts.prefills["handed_over"] > 0, routed.counts.prefills["failed"]) == (True, 0)

            stages: list[tuple[str, Callable[[], bool]]] = [
                ("b", lambda: state("prefill").waiting == 1),
                ("c", lambda: state("decode").running == 2),
            ]
            for first, reached in stages:
                caller = asyncio.create_task(post(asked(first, max_tokens=5_000)))
                await until(reached)
                caller.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await caller
                await until(lambda: state("prefill").kv_used == 0 and state("decode").running == 1)
                assert (state("prefill").waiting, state("prefill").running, state("decode").waiting) == (0, 0, 0)

            caller = asyncio.create_task(post(asked("d")))
            await until(lambda: state("prefill").waiting == 1)
            prefill.signal(signal.SIGKILL)
            answer = await patiently(caller)
            assert answer.json()["choices"][0]["text"] == await undisturbed(asked("d"))
            assert "prefill" not in json.loads(answer.headers["x-trd-route"]), "the decode worker has computed it"
            assert routed.counts.prefills["failed"] == 1
            await other.aclose()
            await until(lambda: (state("decode").waiting, state("decode").running) == (0, 0))
        await prefill.ended()
