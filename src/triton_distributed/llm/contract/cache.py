"""What an engine tells about its KV cache: which blocks it has stored, and which it has removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

BlockHash = int | bytes
"""How an engine names a block. The name is opaque: it is only compared with the other names of the same engine."""


class BlocksStored(msgspec.Struct, kw_only=True, gc=False):
    """Blocks that requests can share from now on, one after the other in one prompt.

    Attributes:
        hashes: the engine's names of the blocks, all numbers or all bytes.
        parent: the name of the block before the first one; None at the beginning of a prompt.
        tokens: the token ids of all blocks, 4 bytes each, little-endian; see `packed`.
        block_tokens: tokens in a block.
        lora: the LoRA adapter that computed the blocks; empty for none.
        namespace: the part of the cache that shares no block with others (`cache_salt` in vLLM); empty for none.
        extra: what else a block depends on, e.g. an image, by the block's place in `hashes`.
        group: the cache group, for an engine that keeps several caches for its kinds of layers.
        full: whether each token of the group attends to all tokens before it; None if the engine does not tell. Blocks
            of other groups are no evidence that a prompt is cached.
    """

    hashes: Sequence[BlockHash]
    parent: BlockHash | None
    tokens: bytes
    block_tokens: int
    lora: str = ""
    namespace: str = ""
    extra: Mapping[int, bytes] | None = None
    group: int | None = None
    full: bool | None = None


class BlocksRemoved(msgspec.Struct, kw_only=True, gc=False):
    """Blocks that are no longer in the cache.

    Attributes:
        hashes: the engine's names of the blocks.
        group: as in `BlocksStored`.
    """

    hashes: Sequence[BlockHash]
    group: int | None = None


class CacheCleared(msgspec.Struct, gc=False):
    """The cache is empty, or what it holds is not known any more."""


CacheEvent = BlocksStored | BlocksRemoved | CacheCleared


class CacheEvents(msgspec.Struct):
    """Events in their order.

    Attributes:
        events: what happened.
        rank: the data-parallel rank of the engine whose cache it is; each rank has its own.
    """

    events: Sequence[CacheEvent]
    rank: int = 0


Publish = Callable[[CacheEvents], object]
"""Takes the events of an engine. It is called on the event loop."""
