"""Batches of events in each encoding give one and the same index."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.llm.kv_events.captures import CAPTURES
from triton_distributed.llm.contract.cache import BlocksRemoved, BlocksStored, CacheCleared
from triton_distributed.llm.contract.request import packed
from triton_distributed.llm.kv_events.decode import EventDecoder
from triton_distributed.llm.kv_events.held import HeldBlocks
from triton_distributed.llm.routing.keys import block_keys, seed_of

KEYS = block_keys(packed(range(100, 112)), 4)
BLOCK = {"type": "BlockStored", "block_hashes": [1], "parent_block_hash": None, "token_ids": [1, 2], "block_size": 2}


def decoded(decoder: EventDecoder, *events: Any, rank: int | None = None) -> Any:
    return decoder.decode(msgspec.msgpack.encode([1.0, list(events), rank]))


def one(**more: Any) -> BlocksStored:
    """The block above with further fields."""
    decoder = EventDecoder()
    (found,) = decoded(decoder, {**BLOCK, **more}).events
    assert decoder.malformed == 0
    assert isinstance(found, BlocksStored)
    return found


@pytest.mark.parametrize("name", CAPTURES)
def test_every_encoding_gives_the_same_index(name: str) -> None:
    decoder, held = EventDecoder(), HeldBlocks(4)
    changes = [held.apply(decoder.decode(bytes.fromhex(each)).events) for each in CAPTURES[name]]
    assert [each.stored.tolist() for each in changes] == [KEYS[:2], KEYS[2:]]
    assert [each.removed.tolist() for each in changes] == [[], []]
    assert (decoder.batches, decoder.events, decoder.unknown, decoder.malformed) == (2, 4, 0, 0)
    assert (held.orphans, held.unknown, held.malformed, held.ignored, len(held)) == (0, 0, 0, 0, 3)


def test_the_rank_and_a_clear_are_read() -> None:
    decoder = EventDecoder()
    for event in (["AllBlocksCleared"], {"type": "AllBlocksCleared", "later": 1}):
        found = decoded(decoder, event, rank=3)
        assert (found.events, found.rank) == ([CacheCleared()], 3)


@pytest.mark.parametrize("kind", ["sliding_window", "sliding_window_mla", "mamba", "chunked_local_attention", "new"])
def test_a_group_without_full_attention_gives_no_key(kind: str) -> None:
    decoder, held = EventDecoder(), HeldBlocks(2)
    row = ["BlockStored", [1], None, [1, 2], 2, None, "GPU", None, None, 1, kind, 1024]
    batch = decoded(decoder, {**BLOCK, "group_idx": 1, "kv_cache_spec_kind": kind}, row)
    assert [(each.group, each.full) for each in batch.events] == [(1, False)] * 2
    assert not held.apply(batch.events)
    assert held.ignored == 2


def test_blocks_elsewhere_are_passed_over_unless_they_are_wanted() -> None:
    decoder, wide = EventDecoder(), EventDecoder(("gpu", "CPU"))
    removed = {"type": "BlockRemoved", "block_hashes": [1]}
    events: list[Any] = [{**each, "medium": "CPU"} for each in (BLOCK, removed)]
    events += [{**each, "medium": "GPU", "locality": "REMOTE"} for each in (BLOCK, removed)]
    events.append(["BlockRemoved", [1], "CPU"])
    assert not decoded(decoder, *events).events
    assert decoder.elsewhere == 5
    assert len(decoded(wide, *events).events) == 3


def test_adapters_and_salts_are_read() -> None:
    assert (one().lora, one().namespace, one().extra) == ("", "", None)
    assert (one(lora_name="x", lora_id=4).lora, one(lora_id=4).lora, one(lora_id=0).lora) == ("x", "4", "")
    assert one(cache_salt="s").namespace == one(metadata={"cache_salt": "s"}).namespace == "s"
    assert one(lora_name="x", extra_keys=[["x"]]).extra is None
    found = one(lora_name="x", extra_keys=[["x", ["image", 3], "salt"]])
    assert (found.lora, found.namespace, found.extra) == ("x", "salt", {0: msgspec.msgpack.encode([["image", 3]])})
    found = one(parent_block_hash=7, extra_keys=[["text"]])
    assert (found.namespace, found.extra) == ("", {0: msgspec.msgpack.encode(["text"])})
    (found,) = decoded(EventDecoder(), ["BlockStored", [1], None, [1, 2], 2, None, "GPU", {"cache_salt": "s"}]).events
    assert (found.lora, found.namespace) == ("", "s")


def test_a_salted_prompt_has_the_keys_of_its_salt() -> None:
    events = [{**BLOCK, "lora_name": "x", "extra_keys": [["x", "salt"]]}]
    keys = HeldBlocks(2).apply(decoded(EventDecoder(), *events).events).stored.tolist()
    assert keys == block_keys(packed([1, 2]), 2, seed_of("x", "salt"))


@pytest.mark.parametrize(
    "event",
    [
        {"type": "BlockStored", "block_hashes": [1]},
        {**BLOCK, "token_ids": [-1, 2]},
        {**BLOCK, "token_ids": [1 << 32, 2]},
        {**BLOCK, "token_ids": [[1, 2], 3]},
        {**BLOCK, "block_hashes": ["text"]},
        {**BLOCK, "block_size": "2"},
        ["BlockStored", [1], None],
        ["BlockRemoved"],
        {"block_hashes": [1]},
        [],
        [7],
        None,
        "BlockStored",
    ],
)
def test_a_malformed_event_is_counted_and_the_others_are_read(event: object, caplog: pytest.LogCaptureFixture) -> None:
    decoder = EventDecoder()
    for _ in range(2):
        batch = decoded(decoder, BLOCK, event, ["BlockRemoved", [2]])
        assert [type(each) for each in batch.events] == [BlocksStored, BlocksRemoved]
    assert (decoder.malformed, decoder.unknown, decoder.events) == (2, 0, 4)
    assert [each.levelname for each in caplog.records] == ["WARNING"]


@pytest.mark.parametrize(
    "payload", [b"", b"\xc1", b"\x93\x01", b"\x00", msgspec.msgpack.encode({"ts": 1.0}), b"\x93" * 99]
)
def test_a_malformed_batch_is_counted(payload: bytes) -> None:
    decoder = EventDecoder()
    assert not decoder.decode(payload).events
    assert (decoder.batches, decoder.malformed) == (1, 1)


def test_an_unknown_type_is_counted_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    decoder = EventDecoder()
    batch = decoded(decoder, {"type": "BlockMigrated", "block_hashes": [1]}, ["BlockMigrated", [1]], BLOCK)
    assert len(batch.events) == 1
    assert (decoder.unknown, decoder.malformed) == (2, 0)
    assert "BlockMigrated" in caplog.text
