"""Reads the batches of events that vLLM and SGLang publish. Pure.

A batch is msgpack. Versions differ: the batch and each event in it is an array or a map; the names of blocks are
numbers or bytes; later fields are missing, or there are more of them. All of them give the same values.

The fields are those of vllm/distributed/kv_events.py and sglang/srt/disaggregation/kv_events.py. Arrays had further
fields at the end, in different orders: there a text is the kind of the cache group, and the first number is the group.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import msgspec

from triton_distributed.llm.contract.cache import (
    BlockHash,
    BlocksRemoved,
    BlocksStored,
    CacheCleared,
    CacheEvent,
    CacheEvents,
)
from triton_distributed.llm.contract.request import packed

logger = logging.getLogger("triton_distributed.llm")

FULL = frozenset({"full_attention", "mla_attention", "sink_full_attention"})
"""Kinds of cache groups whose tokens attend to all tokens before them, as vLLM names them."""

_Tokens = list[int | tuple[int, int]]  # With EAGLE, SGLang gives each token together with the next one.
_Extras = list[list[Any] | None]


class _StoredMap(msgspec.Struct, tag="BlockStored", tag_field="type", gc=False):
    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: _Tokens
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: _Extras | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    locality: str | None = None
    cache_salt: str | None = None
    metadata: dict[str, Any] | None = None


class _RemovedMap(msgspec.Struct, tag="BlockRemoved", tag_field="type", gc=False):
    block_hashes: list[BlockHash]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None


class _ClearedMap(msgspec.Struct, tag="AllBlocksCleared", tag_field="type", gc=False):
    pass


class _StoredArray(msgspec.Struct, tag="BlockStored", array_like=True, gc=False):
    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: _Tokens
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | dict[str, Any] | None = None  # Here SGLang has its metadata.
    extra_keys: _Extras | None = None
    first: Any = None
    second: Any = None
    third: Any = None


class _RemovedArray(msgspec.Struct, tag="BlockRemoved", array_like=True, gc=False):
    block_hashes: list[BlockHash]
    medium: str | None = None
    group_idx: int | None = None


class _ClearedArray(msgspec.Struct, tag="AllBlocksCleared", array_like=True, gc=False):
    pass


class _BatchMap(msgspec.Struct):
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


class _BatchArray(msgspec.Struct, array_like=True):
    ts: float
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


_BATCH_MAP, _BATCH_ARRAY = msgspec.msgpack.Decoder(_BatchMap), msgspec.msgpack.Decoder(_BatchArray)
_MAP = msgspec.msgpack.Decoder(_StoredMap | _RemovedMap | _ClearedMap)
_ARRAY = msgspec.msgpack.Decoder(_StoredArray | _RemovedArray | _ClearedArray)
_KNOWN = {"BlockStored", "BlockRemoved", "AllBlocksCleared"}
_ENCODER = msgspec.msgpack.Encoder()


class EventDecoder:
    """Decodes batches. Nothing is raised: what cannot be used is counted, and logged once.

    Args:
        mediums: where blocks may be that count, as the engine names it. Blocks of which it is not told count, too.

    Attributes:
        batches, events: how many were read.
        unknown: events of types that are not known.
        malformed: batches and events that are not as expected.
        elsewhere: events of blocks in other places, e.g. in the memory of the host.
    """

    def __init__(self, mediums: Collection[str] = ("GPU",)) -> None:
        self._mediums = {each.upper() for each in mediums}
        self.batches = self.events = self.unknown = self.malformed = self.elsewhere = 0
        self._warned: set[str] = set()

    def decode(self, payload: bytes) -> CacheEvents:
        """Read one batch. What cannot be read is not in the answer."""
        found: list[CacheEvent] = []
        self.batches += 1
        try:
            batch = _BATCH_MAP.decode(payload) if _is_map(payload) else _BATCH_ARRAY.decode(payload)
        except msgspec.MsgspecError as error:
            self._note_malformed("batch", error)
            return CacheEvents(found)
        for raw in batch.events:
            try:
                event = self._event(bytes(raw))
            except (msgspec.MsgspecError, OverflowError, TypeError, ValueError) as error:
                self._note_failed(bytes(raw), error)
                continue
            self.events += 1
            if event is not None:
                found.append(event)
        return CacheEvents(found, batch.data_parallel_rank or 0)

    def _event(self, raw: bytes) -> CacheEvent | None:
        event = _MAP.decode(raw) if _is_map(raw) else _ARRAY.decode(raw)
        if isinstance(event, _ClearedMap | _ClearedArray):
            return CacheCleared()
        remote = isinstance(event, _StoredMap | _RemovedMap) and event.locality == "REMOTE"
        if remote or (event.medium is not None and event.medium.upper() not in self._mediums):
            self.elsewhere += 1
            return None
        if isinstance(event, _StoredMap | _StoredArray):
            return _stored(event)
        return BlocksRemoved(hashes=event.block_hashes, group=event.group_idx)

    def _note_failed(self, raw: bytes, error: Exception) -> None:
        """Count an event that cannot be read: of an unknown type, or malformed."""
        try:
            found = msgspec.msgpack.decode(raw)
        except (msgspec.MsgspecError, ValueError):
            found = None
        kind = found.get("type") if isinstance(found, dict) else found[0] if isinstance(found, list) and found else None
        if isinstance(kind, str) and kind not in _KNOWN:
            self.unknown += 1
            self._warn(f"of the type {kind[:40]!r} are passed over")
        else:
            self._note_malformed("event", error)

    def _note_malformed(self, what: str, error: Exception) -> None:
        self.malformed += 1
        self._warn(f"{what} that cannot be read: {error}")

    def _warn(self, text: str) -> None:
        if len(self._warned) < 20 and text not in self._warned:
            self._warned.add(text)
            logger.warning("KV events: %s; the metrics count them", text)


def _is_map(payload: bytes) -> bool:
    first = payload[0] if payload else 0
    return 0x80 <= first <= 0x8F or first in (0xDE, 0xDF)


def _stored(event: _StoredMap | _StoredArray) -> BlocksStored:
    tokens = event.token_ids
    if tokens and isinstance(tokens[0], tuple):
        tokens = [each[0] for each in tokens]  # type: ignore[index]
    found = BlocksStored(
        hashes=event.block_hashes,
        parent=event.parent_block_hash,
        tokens=packed(tokens),  # type: ignore[arg-type]
        block_tokens=event.block_size,
    )
    metadata: dict[str, Any] = {}
    kind: Any = None
    name: Any = event.lora_name
    if isinstance(event, _StoredMap):
        metadata = event.metadata or {}
        found.group, kind = event.group_idx, event.kv_cache_spec_kind
        found.namespace = event.cache_salt or ""
    else:
        if isinstance(name, dict):
            metadata, name = name, None
        tail = (event.first, event.second, event.third)
        found.group = next((each for each in tail if isinstance(each, int)), None)
        kind = next((each for each in tail if isinstance(each, str)), None)
    found.lora = name or (str(event.lora_id) if event.lora_id else "")
    found.full = None if kind is None else kind in FULL
    if isinstance(salt := metadata.get("cache_salt"), str):
        found.namespace = salt
    if event.extra_keys:
        _add_extras(found, event.extra_keys, name)
    return found


def _add_extras(found: BlocksStored, extra_keys: _Extras, lora: str | None) -> None:
    """What a block depends on besides its tokens.

    vLLM gives the name of the LoRA adapter with each block, then what stands for images, and with the first block of a
    prompt the salt of the cache, as the last text.
    """
    extra = {}
    for place, each in enumerate(extra_keys):
        left = list(each or ())
        if lora and lora in left:
            left.remove(lora)
        if place == 0 and found.parent is None:
            for index in range(len(left) - 1, -1, -1):
                if isinstance(left[index], str):
                    salt = left.pop(index)
                    found.namespace = found.namespace or salt
                    break
        if left:
            extra[place] = _ENCODER.encode(left)
    if extra:
        found.extra = extra
