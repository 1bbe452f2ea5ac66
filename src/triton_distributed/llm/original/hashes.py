"""The hashes of blocks under the names of the successor's binding. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from struct import pack
from typing import Any

from triton_distributed.llm.contract.request import packed
from triton_distributed.llm.routing.keys import local_hashes, seed_of


def compute_block_hash_for_seq(
    tokens: Iterable[int],
    kv_block_size: int,
    block_mm_infos: Sequence[Mapping[str, Any] | None] | None = None,
    lora_name: str | None = None,
    is_eagle: bool | None = None,
    cache_namespace: str | None = None,
) -> list[int]:
    """The hash of each whole block of a prompt, as in Dynamo 1.6.

    Args:
        tokens: token ids, from 0 to 2**32 - 1.
        kv_block_size: tokens in a block, at least 1.
        block_mm_infos: for each block None or `{"mm_objects": [{"mm_hash": int}, …]}`, its images and the like.
        lora_name: the LoRA adapter.
        is_eagle: a block is hashed with the first token of the next one.
        cache_namespace: prompts of two namespaces share no block.

    Raises:
        ValueError: `kv_block_size` is below 1.
        OverflowError, TypeError: a token id is invalid.
    """
    if kv_block_size < 1:
        raise ValueError("kv_block_size cannot be 0" if kv_block_size == 0 else "kv_block_size must be at least 1")
    prompt, seed = packed(tokens), seed_of(lora_name or "", cache_namespace or "")
    if not is_eagle and not block_mm_infos:
        return local_hashes(prompt, kv_block_size, seed)
    step = 4 * kv_block_size
    size = step + 4 if is_eagle else step
    found = []
    for number, at in enumerate(range(0, len(prompt) - size + 1, step)):
        block = prompt[at : at + size]
        if block_mm_infos and number < len(block_mm_infos) and (info := block_mm_infos[number]) is not None:
            hashes = sorted(int(each["mm_hash"]) for each in info["mm_objects"])
            block += pack(f"<{len(hashes)}Q", *hashes)
        found += local_hashes(block, len(block) // 4, seed)
    return found


def compute_block_hash_for_seq_py(tokens: Iterable[int], kv_block_size: int) -> list[int]:
    """As `compute_block_hash_for_seq`, under its earlier name."""
    return compute_block_hash_for_seq(tokens, kv_block_size)
