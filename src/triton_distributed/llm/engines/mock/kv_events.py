"""Events of the KV cache, as vLLM publishes them. Pure.

The names and fields are those of vllm/distributed/kv_events.py. Since June 2026 vLLM sends maps, before it arrays.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from triton_distributed.llm.contract.cache import BlocksRemoved, BlocksStored, CacheCleared, CacheEvent, CacheEvents
from triton_distributed.llm.contract.request import unpacked

Form = Literal["map", "array"]

Key = bytes | int
"""The name of a block: bytes, or a number as vLLM sends with `VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES`."""


class BlockStored(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Blocks that can be shared from now on.

    Attributes:
        block_hashes: the keys of the blocks; the mock engine's have 8 bytes each.
        parent_block_hash: the key of the block before the first one; None at the beginning of a prompt.
        tokens: the ids of all the blocks' tokens, packed.
        block_size: tokens in a block.
        lora_id, medium, lora_name: as in vLLM.
    """

    block_hashes: list[Key]
    parent_block_hash: Key | None
    tokens: bytes
    block_size: int
    lora_id: int | None = None
    medium: str | None = "GPU"
    lora_name: str | None = None


class BlockRemoved(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Blocks that are no longer in the cache."""

    block_hashes: list[Key]
    medium: str | None = "GPU"


class AllBlocksCleared(msgspec.Struct, frozen=True, tag=True):
    """The cache is empty."""


Event = BlockStored | BlockRemoved | AllBlocksCleared

_ENCODER = msgspec.msgpack.Encoder()


def reported(events: list[Event]) -> CacheEvents:
    """The events as an `Engine` reports them."""
    found: list[CacheEvent] = []
    for each in events:
        if isinstance(each, BlockStored):
            found.append(
                BlocksStored(
                    hashes=each.block_hashes,
                    parent=each.parent_block_hash,
                    tokens=each.tokens,
                    block_tokens=each.block_size,
                )
            )
        elif isinstance(each, BlockRemoved):
            found.append(BlocksRemoved(hashes=each.block_hashes))
        else:
            found.append(CacheCleared())
    return CacheEvents(found)


def encoded(at_s: float, events: list[Event], form: Form = "map", data_parallel_rank: int | None = None) -> bytes:
    """An event batch in msgpack.

    Args:
        at_s: the time of the batch in s.
        events: in their order.
        form: `map` for structs as maps, `array` for structs as arrays, tag first.
        data_parallel_rank: of the engine.
    """
    maps = [_fields(each) for each in events]
    if form == "map":
        return _ENCODER.encode({"ts": at_s, "events": maps, "data_parallel_rank": data_parallel_rank})
    return _ENCODER.encode([at_s, [list(each.values()) for each in maps], data_parallel_rank])


def _fields(event: Event) -> dict[str, Any]:
    """An event's fields in the order of an array."""
    found: dict[str, Any] = {"type": type(event).__name__}
    for name in event.__struct_fields__:
        value = getattr(event, name)
        if name == "tokens":
            found["token_ids"] = unpacked(value).tolist()
        else:
            found[name] = value
    return found
