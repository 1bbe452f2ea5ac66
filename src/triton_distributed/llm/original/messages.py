"""What travels between the original's workers and its router, as JSON. Pure."""

from __future__ import annotations

from typing import Literal

import msgspec

BLOCK_TOKENS = 64
"""Tokens of a block. The original knows no other size."""

KV_EVENTS = "kv_events"
"""The event in which a worker tells what its cache holds."""

KV_METRICS = "kv_metrics"
"""The event in which a worker of this runtime tells its load. The original's router asks for it once a second."""

LOAD_METRICS = "load_metrics"
"""The endpoint that answers with the load."""


class StoredBlock(msgspec.Struct):
    """A block that a worker holds: its engine's name for it, and the hash of its tokens."""

    block_hash: int
    tokens_hash: int

    def __post_init__(self) -> None:
        if (self.block_hash | self.tokens_hash) >> 64:  # Of a negative number it is -1.
            raise ValueError("a hash must be from 0 to 2**64 - 1")


class Stored(msgspec.Struct):
    """Blocks, each the child of the one before it. `parent_hash` is None at the beginning of a prompt."""

    blocks: list[StoredBlock]
    parent_hash: int | None = None


class Removed(msgspec.Struct):
    """Blocks that the worker does not hold any more."""

    block_hashes: list[int]


class Change(msgspec.Struct, omit_defaults=True):
    """One of the two."""

    stored: Stored | None = None
    removed: Removed | None = None


class KvCacheEvent(msgspec.Struct, omit_defaults=True):
    """A change of a worker's cache. `dp_rank` is its data-parallel rank, which the original does not have."""

    event_id: int
    data: Change | Literal["cleared"]
    dp_rank: int = 0


class RouterEvent(msgspec.Struct):
    """A worker's event, as it is published."""

    worker_id: int
    event: KvCacheEvent


class Load(msgspec.Struct):
    """What a worker has to do."""

    request_active_slots: int = 0
    request_total_slots: int = 0
    kv_active_blocks: int = 0
    kv_total_blocks: int = 0

    @property
    def at_capacity(self) -> bool:
        """Whether it can take no request. A worker that has not told its load yet is at capacity."""
        return self.request_active_slots >= self.request_total_slots or self.kv_active_blocks >= self.kv_total_blocks


class WorkerLoad(msgspec.Struct):
    """A worker's load, as this runtime publishes it."""

    worker_id: int
    data: Load


class StatsEndpoint(msgspec.Struct, omit_defaults=True):
    """An endpoint in the statistics of a NATS service. The worker's id is the hexadecimal end of the subject."""

    name: str
    subject: str
    data: Load | None = None

    @property
    def worker_id(self) -> int:
        """The worker's id.

        Raises:
            ValueError: the subject has none.
        """
        return int(self.subject.rpartition("-")[2], 16)


class ServiceStats(msgspec.Struct):
    """The statistics of a NATS service, as each of its processes answers `$SRV.STATS.{service}`."""

    name: str
    id: str
    endpoints: list[StatsEndpoint]
    version: str = "0.0.1"
    started: str = ""
    type: str = "io.nats.micro.v1.stats_response"
