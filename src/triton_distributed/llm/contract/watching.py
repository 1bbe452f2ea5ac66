"""The stream of the endpoint `watch`: what a worker tells each router about its KV cache and its requests.

It begins with a snapshot, in parts, and goes on with what changes. An update is applied in the order of its fields.
What a worker tells is complete: a stream that ends is opened again, and begins with a new snapshot.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import Literal

import msgspec

CacheMode = Literal["exact", "approximate", "off"]
"""How a worker knows its engine's cache: by the engine's events, by the requests that it got, or not at all."""


class WatchRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Opens the stream.

    Attributes:
        router: the router's id. It does not get its own requests: it knows them.
    """

    router: int = 0


class Blocks(msgspec.Struct, frozen=True, array_like=True):
    """A change of the blocks that a worker holds.

    Attributes:
        rank: the data-parallel rank.
        change: what happened to them; `cleared` for all blocks of the rank.
        keys: of the blocks, 8 bytes each, little-endian; see `keys_of`. Those of one prompt are in its order.
    """

    rank: int
    change: Literal["stored", "removed", "cleared"]
    keys: bytes = b""


class Begun(msgspec.Struct, frozen=True, array_like=True):
    """A request of another router.

    Attributes:
        number: names it in this stream.
        rank: the data-parallel rank.
        tokens: of its prompt.
        keys: of the whole blocks of its prompt, packed; empty after the first output.
        age_s: seconds since it came.
        computed: it has a first output already, or another worker computes its prompt.
    """

    number: int
    rank: int
    tokens: int
    keys: bytes = b""
    age_s: float = 0.0
    computed: bool = False


class Computed(msgspec.Struct, frozen=True, array_like=True):
    """The first output of such a request.

    Attributes:
        number: the request's.
        cached_tokens: tokens of its prompt that needed no computing; -1 if the engine has not told.
    """

    number: int
    cached_tokens: int = -1


class WatchUpdate(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What has happened since the last update.

    Attributes:
        begins: a snapshot begins: earlier updates no longer count.
        mode: how the cache is known.
        silent: the engine should report its blocks, and has not.
        block_tokens: tokens in a block.
        ranks: data-parallel ranks of the engine.
        kv_used: the part of the KV cache that requests hold, from 0 to 1; 0 if the engine does not tell.
        blocks: changes of the cache, in their order.
        begun, computed, ended: changes of the requests of other routers; `ended` has their numbers.
        more: further parts of the snapshot come. The router knows the whole cache when it is False.
    """

    begins: bool = False
    mode: CacheMode = "off"
    silent: bool = False
    block_tokens: int = 64
    ranks: int = 1
    kv_used: float = 0.0
    blocks: list[Blocks] = []
    begun: list[Begun] = []
    computed: list[Computed] = []
    ended: list[int] = []
    more: bool = False


def packed_keys(keys: Iterable[int]) -> bytes:
    """Pack the keys of blocks: 8 bytes each, little-endian."""
    found = keys if isinstance(keys, array) else array("Q", keys)
    if sys.byteorder == "big":
        found = found[:]
        found.byteswap()
    return found.tobytes()


def keys_of(packed: bytes) -> array[int]:
    """Unpack keys.

    Raises:
        ValueError: the length is not a multiple of 8.
    """
    found = array("Q", packed)
    if sys.byteorder == "big":
        found.byteswap()
    return found
