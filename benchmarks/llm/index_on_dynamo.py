"""Dynamo's index: `python -m benchmarks.llm.index_on_dynamo BLOCKS` in its environment, for `benchmarks.llm.index`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from dynamo.llm import RadixTree, compute_block_hash_for_seq

from benchmarks.llm.index_work import hashed, measured


class Tree:
    """`RadixTree`, which takes events as JSON."""

    def __init__(self) -> None:
        self._tree = RadixTree()
        self.apply, self.find = self._tree.apply_event, self._tree.find_matches

    def stored(self, keys: Sequence[int]) -> bytes:
        blocks = [{"block_hash": each, "tokens_hash": each} for each in keys]
        return self._event(stored={"parent_hash": None, "blocks": blocks})

    def removed(self, keys: Sequence[int]) -> bytes:
        return self._event(removed={"block_hashes": list(keys)})

    def depths(self, found: Any) -> dict[int, int]:
        return {worker: depth for (worker, _), depth in found.scores.items()}

    def clear(self, worker: int) -> Iterator[None]:
        self._tree.clear_all_blocks(worker)
        # The call only hands the work to the thread of the tree. A look-up waits for it.
        self._tree.find_matches([1])
        yield

    def _event(self, **data: Any) -> bytes:
        return json.dumps({"event_id": 1, "data": data}).encode()


if __name__ == "__main__":
    print(json.dumps({**measured(Tree(), int(sys.argv[1])), **hashed(compute_block_hash_for_seq)}))
