"""Keys of the blocks of a prompt. Pure.

A key stands for all tokens up to the end of its block: it is the 64-bit XXH3 of the block's tokens, with the key of the
block before it as the seed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

try:
    from xxhash import xxh3_64_intdigest
except ImportError as error:
    raise ImportError("routing by cache needs xxhash: pip install 'triton-distributed[llm]'") from error

FIRST_SEED = 1337
"""The seed of the first block of a prompt without a salt, as in `KvRouter` of the original and in Dynamo 1.6."""

JOINED_TOKENS = 64
"""Blocks with fewer tokens are joined to this many: hashing takes 0.5 µs a block, and hardly more a token."""


def indexed_tokens(block_tokens: int) -> int:
    """The tokens of a block of the index, for an engine with blocks of `block_tokens`: 64 for 16, 128 for 128.

    They are 64 for an engine that does not tell its blocks (0).
    """
    return -(-JOINED_TOKENS // block_tokens) * block_tokens if block_tokens else JOINED_TOKENS


def seed_of(lora: str = "", namespace: str = "") -> int:
    """The first seed of prompts that share no block with others, as Dynamo 1.6 computes it.

    Args:
        lora: the name of a LoRA adapter; empty for none.
        namespace: the name of a namespace of the cache; empty for none.
    """
    seed = FIRST_SEED
    if lora:
        seed += xxh3_64_intdigest(lora.encode(), 0)
    if namespace:
        seed += xxh3_64_intdigest(namespace.encode(), 1)
    return seed & 0xFFFF_FFFF_FFFF_FFFF


def block_keys(prompt: bytes, block_tokens: int, seed: int = FIRST_SEED) -> list[int]:
    """The keys of the whole blocks of a prompt. The tokens after the last whole block have none.

    Args:
        prompt: token ids, 4 bytes each, little-endian.
        block_tokens: tokens in a block.
        seed: of the first block; or the key of the block before the first token.
    """
    size = 4 * block_tokens
    view = memoryview(prompt)
    found: list[int] = []
    append = found.append
    for end in range(size, len(prompt) + 1, size):
        seed = xxh3_64_intdigest(view[end - size : end], seed)
        append(seed)
    return found


def local_hashes(prompt: bytes, block_tokens: int, seed: int = FIRST_SEED) -> list[int]:
    """The hash of each whole block by itself, as the original and Dynamo compute it.

    Args:
        prompt: token ids, 4 bytes each, little-endian.
        block_tokens: tokens in a block.
        seed: of each block; see `seed_of`.
    """
    size = 4 * block_tokens
    view = memoryview(prompt)
    return [xxh3_64_intdigest(view[end - size : end], seed) for end in range(size, len(prompt) + 1, size)]


_PAIR = struct.Struct("<QQ")


def sequence_hashes(local: Iterable[int]) -> list[int]:
    """The chained hashes of blocks as Dynamo 1.6 computes them from the local ones."""
    found: list[int] = []
    for each in local:
        found.append(xxh3_64_intdigest(_PAIR.pack(found[-1], each), FIRST_SEED) if found else each)
    return found
