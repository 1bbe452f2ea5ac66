"""What a worker knows of its engine's cache: by events of no use, by answers, and with adapters."""

from __future__ import annotations

from typing import Any

import pytest

from tests.llm.test_worker import connect
from triton_distributed import Stream
from triton_distributed.llm import BlocksStored, CacheEvents, Engine, Model, ModelCard, Output, Request, packed
from triton_distributed.llm.contract.watching import WatchRequest, WatchUpdate, keys_of
from triton_distributed.llm.models.routed import Routed
from triton_distributed.llm.routing.keys import block_keys, seed_of
from triton_distributed.llm.worker.serve import serve_model
from triton_distributed.llm.worker.watch import Watching


class Grouped(Engine):
    """An engine with several cache groups, as the first versions of vLLM that told groups: without their kinds."""

    def kv_events(self, publish: Any) -> bool:
        self.publish = publish
        return True


async def test_a_worker_assumes_the_cache_of_an_engine_whose_groups_have_no_kinds() -> None:
    engine = Grouped()
    watching = Watching(engine)
    watching.open(ModelCard(name="m", tokenizer="bytes", kv_block_tokens=64))
    tokens = packed(range(64))
    for group in range(2):
        assert watching.mode == "exact"
        event = BlocksStored(hashes=[1], parent=None, tokens=tokens, block_tokens=64, group=group)
        engine.publish(CacheEvents([event]))
    assert (watching.mode, watching.silent) == ("approximate", False)
    engine.publish(CacheEvents([event]))
    watching.ended(watching.begun(Request(prompt=tokens)))
    assert (watching.mode, watching.known) == ("approximate", 1)
    watching.close()


class Speaker(Engine):
    """Answers with the numbers from 1000 on. With `events`, it reports the blocks of each prompt."""

    def __init__(self, *, events: bool = False, adapters: tuple[str, ...] = ()) -> None:
        self.model = Model(
            card=ModelCard(name="m", adapters=adapters, kv_block_tokens=16, context_tokens=4096), tokenizer="bytes"
        )
        self.events = events

    def kv_events(self, publish: Any) -> bool:
        self.publish = publish
        return self.events

    async def generate(self, request: Request) -> Any:
        if self.events:
            blocks = len(request.token_ids) // 16
            lora = "" if request.model == "m" else request.model
            names = [hash((lora, each)) for each in range(blocks)]
            tokens = request.prompt[: 64 * blocks]
            stored = BlocksStored(hashes=names, parent=None, tokens=tokens, block_tokens=16, lora=lora)
            self.publish(CacheEvents([stored]))
        for at in range(request.max_tokens):
            last = at == request.max_tokens - 1
            yield Output([1000 + at], finish_reason="length" if last else None)


async def known(here: Any, card: ModelCard) -> set[int]:
    """The keys that a worker tells a new router."""
    watch = Stream[WatchRequest, WatchUpdate](f"models.{card.component}.watch")
    async with here.stream(watch, WatchRequest(router=1)) as updates:
        return {key for each in (await anext(aiter(updates))).blocks for key in keys_of(each.keys)}


async def ask(here: Any, card: ModelCard, request: Request) -> None:
    endpoint = Stream[Request, Output](f"models.{card.component}.generate")
    assert len([each async for each in here.stream(endpoint, request)]) == request.max_tokens


async def test_the_next_turn_of_a_conversation_is_assumed_to_be_cached_with_its_answer() -> None:
    async with connect() as worker, connect() as here:
        card = (await serve_model(worker, Speaker())).card
        prompt, answer = list(range(100)), list(range(1000, 1093))
        await ask(here, card, Request(prompt=packed(prompt), max_tokens=93))
        # 193 tokens are three blocks of 64: the engine has read the last token of the third one.
        assert await known(here, card) == {*block_keys(packed([*prompt, *answer]), 64)}
        await ask(here, card, Request(prompt=packed(prompt), max_tokens=92, cache_salt="s"))
        salted = block_keys(packed([*prompt, *answer]), 64, seed_of(namespace="s"))
        assert await known(here, card) & {*salted} == {*salted[:2]}, "the last token of 192 is never read"


@pytest.mark.parametrize("events", [True, False])
async def test_prompts_with_an_adapter_share_no_block_with_others(events: bool) -> None:
    async with connect() as worker, connect() as here:
        card = (await serve_model(worker, Speaker(events=events, adapters=("a", "b")))).card
        prompt = packed(range(128))
        expected: set[int] = set()
        for name, lora in (("a", "a"), ("m", ""), ("b", "b")):
            await ask(here, card, Request(prompt=prompt, max_tokens=1, model=name))
            expected |= {*block_keys(prompt, 64, seed_of(lora))}
            assert await known(here, card) == expected
        assert len(expected) == 6
        routed = Routed(here, "models", card, "kv")
        await routed.router.until_whole(10)
        for name in ("a", "m", "b", "m"):
            question = routed.question(Request(prompt=prompt, model=name), 128, "")
            assert set(question.keys) < expected
            assert [*routed.router.core.index.depths(question.keys).values()] == [2]
        other = Request(prompt=prompt, model="a", cache_salt="s")
        assert routed.router.core.index.depths(routed.question(other, 128, "").keys) == {}
        await routed.close()
