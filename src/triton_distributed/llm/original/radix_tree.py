"""`RadixTree` and `OverlapScores` of the successor's binding."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import msgspec

from triton_distributed.llm.original.blocks import Blocks, UnknownBlocks
from triton_distributed.llm.original.messages import KvCacheEvent

K = TypeVar("K")

_EVENT = msgspec.json.Decoder(KvCacheEvent)
_ENCODER = msgspec.json.Encoder()


class OverlapScores(Generic[K]):
    """How many of a prompt's first blocks workers hold.

    Attributes:
        scores: the number of blocks by worker. Workers without one are not in it.
        frequencies: how often each block was asked for lately; always empty, as in a tree without expiry.
    """

    def __init__(self, scores: dict[K, int]) -> None:
        self.scores = scores
        self.frequencies: list[int] = []

    def __repr__(self) -> str:
        return f"OverlapScores(scores={self.scores})"


class RadixTree:
    """Which worker holds which blocks. It may be used by several threads.

    Args:
        expiration_duration_secs: only None: blocks do not expire.
    """

    def __init__(self, expiration_duration_secs: None = None) -> None:
        if expiration_duration_secs is not None:
            raise ValueError(f"expiration_duration_secs={expiration_duration_secs!r}: blocks do not expire here")
        self._blocks = Blocks(tells=True)
        self._lock = threading.Lock()

    def find_matches(self, sequence: Iterable[int], early_exit: bool = False) -> OverlapScores[tuple[int, int]]:
        """The workers that hold the beginning of a prompt, by (worker id, data-parallel rank).

        Args:
            sequence: hashes of its blocks; see `compute_block_hash_for_seq`.
            early_exit: no effect: the scores are complete in any case.
        """
        with self._lock:
            return OverlapScores(self._blocks.depths(list(sequence)))

    def apply_event(self, worker_id: int, kv_cache_event_bytes: bytes) -> None:
        """Note a change of a worker's cache.

        Args:
            worker_id: the worker.
            kv_cache_event_bytes: JSON, e.g. `{"event_id": 1, "data": {"removed": {"block_hashes": [7]}}}`.

        Raises:
            ValueError: it is no such JSON.
            RuntimeError: it names a parent, or a removed block, that the worker does not hold.
        """
        try:
            event = _EVENT.decode(kv_cache_event_bytes)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"Failed to deserialize KvCacheEvent: {error}") from error
        with self._lock:
            try:
                self._blocks.apply(worker_id, event)
            except UnknownBlocks as error:
                raise RuntimeError(f"Failed to apply event: {error}") from error

    def remove_worker(self, worker_id: int) -> None:
        """Forget a worker."""
        with self._lock:
            self._blocks.forget(worker_id)

    def clear_all_blocks(self, worker_id: int) -> None:
        """Note that a worker holds nothing any more."""
        with self._lock:
            self._blocks.clear(worker_id)

    def dump_tree_as_events(self) -> list[str]:
        """JSON for each block: `{"worker_id": …, "event": …}`. `apply_event` takes the part `event`."""
        with self._lock:
            return list(self._dumped())

    def _dumped(self) -> Iterator[str]:
        for each in self._blocks.events():
            yield _ENCODER.encode(each).decode()


def by_worker_id(scores: dict[tuple[int, int], int]) -> dict[int, int]:
    """The greatest score among the ranks of each worker."""
    found: dict[int, int] = {}
    for (worker_id, _), score in scores.items():
        found[worker_id] = max(score, found.get(worker_id, 0))
    return found
