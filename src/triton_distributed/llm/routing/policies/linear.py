"""The policy `kv_linear`: the cost function of Dynamo 1.6, in blocks, for comparison."""

from __future__ import annotations

import random
from collections.abc import Sequence

from triton_distributed.llm.routing.view import Candidate, Question


class KvLinear:
    """The candidate with the fewest blocks to prefill and to decode. A random one of equal candidates.

    Blocks to decode are those of all prompts at the worker and of this one; a block that several share counts once.

    Args:
        rng: the random source.
        credit: blocks that are taken off for each cached block. Dynamo has 1 if nothing else is set.
    """

    counts_blocks = True
    """Candidates have `unique_tokens`."""

    def __init__(self, rng: random.Random, credit: float = 1.0) -> None:
        self._rng, self._credit = rng, credit

    def __call__(self, question: Question, candidates: Sequence[Candidate]) -> Candidate:
        """Choose a candidate."""
        size = question.block_tokens
        for each in candidates:
            prefill = each.waiting_tokens + question.tokens - self._credit * each.cached_tokens
            each.cost = (max(0.0, prefill) + each.unique_tokens) / size
        least = min(each.cost for each in candidates if each.cost is not None)
        best = [each for each in candidates if each.cost == least]
        return best[0] if len(best) == 1 else self._rng.choice(best)
