"""How a mock engine hands a computed prompt over to another one, and what is left when something fails."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import Any

import pytest

from tests.timing import PATIENCE_S
from triton_distributed.llm import InvalidParameter, Output, Request, packed
from triton_distributed.llm.contract.cache import BlocksStored, CacheEvents
from triton_distributed.llm.engines.mock.engine import MockEngine

PROMPT = packed([number % 251 for number in range(1000)])
PREFILL = Request(prompt=PROMPT, max_tokens=1, ignore_eos=True)


def engine(role: str, **options: Any) -> MockEngine:
    return MockEngine(role=role, **{"ttft_ms": 1, "itl_ms": 1, "answer_tokens": 4, **options})


def tokens(outputs: list[Output]) -> list[int]:
    return [token for each in outputs for token in each.token_ids]


def used(*engines: MockEngine) -> list[int]:
    return [each.metrics().kv_blocks_used for each in engines]


async def until(holds: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.001)


async def test_a_prompt_is_kept_until_it_was_fetched_and_both_caches_have_it():
    there, here, alone = engine("prefill", transfer_token_ms=0.05), engine("decode", ttft_ms=60_000), engine("both")
    events: list[CacheEvents] = []
    assert here.kv_events(events.append)
    await there.start()
    async with aclosing(there.generate(PREFILL)) as prefill:
        first = await anext(prefill)
        assert (len(first.token_ids), first.finish_reason, used(there)) == (1, None, [16])
        began = time.monotonic()
        request = Request(prompt=PROMPT, max_tokens=9, kv_transfer=first.kv_transfer)
        found = [each async for each in here.generate(request)]
        assert time.monotonic() - began >= 0.05, "1,000 tokens at 0.05 ms, and no prefill of a minute"
        assert tokens(found) == tokens([each async for each in alone.generate(Request(prompt=PROMPT, max_tokens=9))])
        last = await anext(prefill)
        assert (last.finish_reason, last.token_ids, last.kv_transfer) == ("length", [], None)
        assert [each async for each in prefill] == []
    assert used(there, here) == [0, 0]
    stored = [each for batch in events for each in batch.events if isinstance(each, BlocksStored)]
    assert b"".join(each.tokens for each in stored)[: 960 * 4] == PROMPT[: 960 * 4]
    for each in (there, here, alone):
        await each.close()
    assert len(asyncio.all_tasks()) == 1


async def test_what_cannot_be_fetched_is_computed_here_and_nothing_stays_kept():
    there, here = engine("prefill", transfer_token_ms=100), engine("decode")
    await there.start()
    async with aclosing(there.generate(PREFILL)) as prefill:
        told = (await anext(prefill)).kv_transfer
        request = Request(prompt=PROMPT, max_tokens=9, kv_transfer=told)
        reader = asyncio.create_task(anext(here.generate(request)))
        ending = asyncio.create_task(anext(prefill))
        await until(lambda: there._keeper is not None and there._keeper._tasks)
        reader.cancel()  # The caller of the answer leaves.
        assert (await ending).finish_reason == "length"
    assert used(there, here) == [0, 0]
    async with aclosing(there.generate(PREFILL)) as prefill:
        told = (await anext(prefill)).kv_transfer
    assert used(there) == [0], "the caller of the prefill has left"
    gone = Request(prompt=PROMPT, max_tokens=9, kv_transfer=told)
    assert len(tokens([each async for each in here.generate(gone)])) == 5
    there._hold_s = 0.01  # type: ignore[assignment]
    found = [each async for each in there.generate(PREFILL)]
    assert ([each.finish_reason for each in found], used(there)) == ([None, "length"], [0]), "none has fetched it"
    await there.close()
    assert len(tokens([each async for each in here.generate(gone)])) == 5
    await here.close()
    with pytest.raises(InvalidParameter, match="not that of a mock engine"):
        await anext(here.generate(Request(prompt=PROMPT, kv_transfer={"remote_host": "x"})))
    assert here.metrics().active == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"role": "first", "itl_ms": 1}, "role: expected one of both, prefill, decode, got 'first'"),
        ({"role": "prefill"}, "role: the speed instant has no KV cache"),
        ({"transfer_token_ms": 1}, "transfer_token_ms: with the speed instant"),
        ({"itl_ms": 1, "transfer_token_ms": "-1"}, "transfer_token_ms: expected a number"),
        ({"itl_ms": 1, "hold_s": "0"}, "hold_s"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], says: str):
    with pytest.raises(InvalidParameter, match=says):
        MockEngine(**options)
