"""What a worker does with the events of an engine that are of no use."""

from __future__ import annotations

from typing import Any

from triton_distributed.llm import BlocksStored, CacheEvents, Engine, ModelCard, Request, packed
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
