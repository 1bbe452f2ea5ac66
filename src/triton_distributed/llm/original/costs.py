"""The cost with which the original chooses a worker. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from triton_distributed.llm.original.messages import BLOCK_TOKENS, Load

UNBALANCED = 0.1
"""Deviation of the loads, as a part of their mean, above which balance weighs more than overlap."""

BALANCE_WEIGHT, OVERLAP_WEIGHT = 0.7, 0.3
"""The weight of a worker's load if the loads are unbalanced, and if not."""

REQUESTS_WEIGHT = 0.1


class Loads:
    """The loads of all workers by their ids, with what was booked since each of them told its load."""

    def __init__(self) -> None:
        self.by_worker: dict[int, Load] = {}

    def choose(self, overlap: Mapping[int, int], tokens: int) -> int | None:
        """Choose the worker with the least cost, and book the request there.

        Args:
            overlap: blocks of the prompt that each worker holds.
            tokens: of the prompt.

        Returns:
            The worker's id; None if no worker is known, or all are at capacity.
        """
        loads = self.by_worker
        if not loads:
            return None
        mean = sum(each.kv_active_blocks for each in loads.values()) / len(loads)
        deviation = (sum((each.kv_active_blocks - mean) ** 2 for each in loads.values()) / len(loads)) ** 0.5
        weight = BALANCE_WEIGHT if deviation > UNBALANCED * mean else OVERLAP_WEIGHT
        best, least = None, float("inf")
        for worker, load in loads.items():
            if load.at_capacity:
                continue
            new = max(0, tokens - overlap.get(worker, 0) * BLOCK_TOKENS)
            cost = (
                weight * (load.kv_active_blocks / load.kv_total_blocks - mean)
                + (1 - weight) * (new / tokens if tokens else 0.0)
                + REQUESTS_WEIGHT * load.request_active_slots / load.request_total_slots
            )
            if cost < least:
                best, least = worker, cost
        if best is not None:
            chosen = loads[best] = loads.pop(best)  # To the end: of equal workers the next one is chosen next.
            chosen.request_active_slots += 1
            chosen.kv_active_blocks += min(tokens // BLOCK_TOKENS, 1)
        return best
