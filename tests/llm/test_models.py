"""Which models callers see: by name and alias, generation after generation, until the last worker leaves."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

import triton_distributed as trd
from tests.llm.test_worker import Echo, connect
from tests.runtime.cluster import until
from tests.timing import PATIENCE_S
from triton_distributed.api.running import until_ended
from triton_distributed.cli.model import together
from triton_distributed.llm import LLMError, ModelNotFound, Models, PrefillOnly, Request, Usage, serve_model
from triton_distributed.llm.engines.mock.engine import MockEngine
from triton_distributed.llm.http import openai_app


async def test_models_are_found_by_name_and_the_newest_generation_is_used():
    before = asyncio.all_tasks()
    async with connect() as one, connect() as two, connect() as here:
        await serve_model(one, Echo("first", aliases=("short",), tokenizer="bytes"))
        async with Models(here) as models:
            found = await models.wait_for("first", 10)
            assert found.created > 1_600_000_000
            assert found.prompts.ids([65, 66]).ids == b"A\0\0\0B\0\0\0"
            assert models.get("short") is found is models.get("first")
            with pytest.raises(ModelNotFound, match="'other' is not served; models that are: first"):
                models.get("other")
            with pytest.raises(ModelNotFound):
                await models.wait_for("other", 0)
            waiting = asyncio.ensure_future(models.wait_for("second"))
            await serve_model(two, Echo("second"))
            assert (await waiting).card.name == "second"
            newer = await serve_model(two, Echo("first", generation=1))
            async with asyncio.timeout(10):
                while models.get("first").card.generation != 1:
                    await asyncio.sleep(0)
            assert models.get("short") is found, "the older version alone has the alias"
            assert [each.card.name for each in models.list()] == ["first", "second"]
            await newer.stop()
            assert models.get("first") is found
            await one.close()
            assert [each.card.name for each in models.list()] == ["second"]
            models.expected = frozenset({"first", "second"})
            with pytest.raises(trd.NoInstances, match="the model 'first'"):
                models.get("first")
            waiting = asyncio.ensure_future(models.wait_for("first"))
            await serve_model(two, Echo("first"))
            assert (await waiting).card.name == "first"
    await asyncio.sleep(0)
    assert asyncio.all_tasks() <= before


async def test_a_model_with_prefill_workers_only_is_not_listed_and_the_error_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(together, "NEWS_S", 0)
    async with connect() as one, connect() as two, connect() as here, Models(here) as models:
        prefills = models._watch.table.prefills
        prefill = await serve_model(one, MockEngine(role="prefill", speed="dynamo"))
        await until(lambda: prefills)
        waiting = asyncio.ensure_future(together.answering(models, "mock"))
        transport = httpx.ASGITransport(openai_app(models))
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as http:
            answer = await http.post("/v1/completions", json={"model": "mock", "prompt": "a"})
            assert (answer.status_code, answer.json()["error"]["message"]) == (503, str(PrefillOnly("mock")))
            assert (await http.get("/v1/models")).json()["data"] == []
        decode = await serve_model(two, MockEngine(role="decode", speed="dynamo"))
        assert (await waiting).card.name == "mock"
        assert capsys.readouterr().err == f"trd model run: {PrefillOnly('mock')}\n"
        await decode.stop()
        await until(lambda: not models.list())
        with pytest.raises(PrefillOnly, match="has prefill workers only; start one with `--role decode`"):
            models.get("mock")
        await prefill.stop()
        await until(lambda: not prefills)
        with pytest.raises(ModelNotFound):
            models.get("mock")


async def test_a_drain_does_not_count_the_routers_that_watch_a_worker(capsys: pytest.CaptureFixture[str]):
    async with connect() as worker, connect() as here, Models(here) as models:
        serving = await serve_model(worker, MockEngine())
        routed = (await models.wait_for("mock", 10)).routed
        assert routed is not None
        await until(lambda: any(each.watched for each in routed.states()))
        ending = asyncio.ensure_future(until_ended(worker, [asyncio.ensure_future(serving.until_drained())]))
        await asyncio.sleep(0)
        worker.runtime.shutdown()
        await ending
    assert "draining" not in capsys.readouterr().err


async def test_a_model_whose_tokenizer_is_damaged_is_not_listed_and_the_error_says_why():
    async with connect() as worker, connect() as here, Models(here) as models:
        await serve_model(worker, Echo("broken", tokenizer=b"no JSON"))
        await serve_model(worker, Echo("good"))
        with pytest.raises(LLMError, match="'broken' is served, and cannot be used in this process: "):
            await models.wait_for("broken", 10)
        await models.wait_for("good", 10)
        assert [each.card.name for each in models.list()] == ["good"]


@contextlib.asynccontextmanager
async def within_patience(models: Models, folder: Path) -> AsyncIterator[None]:
    """Give the body the time that a busy machine needs. If that is not enough, tell what there is and what waits for what."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield
    except TimeoutError:
        watch = models._watch
        print("known:", [*watch.table.entries], "usable:", [*watch.prompts], "unusable:", watch.unusable)
        print("being loaded:", [*watch._loading], "in the folder:", [str(each) for each in folder.rglob("*")])
        for task in asyncio.all_tasks():
            task.print_stack(file=sys.stdout)
        raise


async def test_a_chat_over_file_discovery_and_sockets(trd_dir: Path):
    config = trd.Config.from_env(discovery="file", handle_signals=False, watchdog_s=0)
    async with (
        trd.connect(config) as worker, trd.connect(config) as here, Models(here) as models, within_patience(models, trd_dir)
    ):  # fmt: skip
        served = await serve_model(worker, MockEngine(name="mock"), name="small", aliases=("other",), generation=3)
        found = await models.wait_for("other")
        assert (found.card.name, found.card.generation) == ("small", 3)
        prompt = await found.prompts.chat([{"role": "user", "content": "hi"}])
        deltas = [each async for each in found.answer(prompt, Request(max_tokens=5))]
        assert "".join(each.text for each in deltas)
        assert deltas[-1].usage == Usage(prompt.tokens, 5)
        await served.stop()
        while models.list():
            await asyncio.sleep(0.01)


async def test_models_that_are_served_already_are_loaded_when_it_is_waited_for():
    async with connect() as worker, connect() as here:
        await serve_model(worker, Echo("good", tokenizer="bytes"))
        await serve_model(worker, Echo("broken", tokenizer=b"no JSON"))
        async with Models(here) as models:
            await models.until_loaded(0)
            with pytest.raises(ModelNotFound):
                models.get("good")
            await models.until_loaded(60)
            assert [each.card.name for each in models.list()] == ["good"]
            with pytest.raises(LLMError, match="'broken'"):
                models.get("broken")
