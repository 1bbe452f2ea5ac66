"""The policy `kv`: the least time, with what a cached block saves counted three times."""

from __future__ import annotations

from collections.abc import Sequence

from triton_distributed.llm.routing.view import Candidate, Question

SAVING = 3.0
"""How often a saved second counts: requests that queue later profit from it, too. Decision 9 has the measurements."""


def kv(question: Question, candidates: Sequence[Candidate]) -> Candidate:
    """The candidate with the least `wait_s + prefill_s - (SAVING - 1) * saved_s`."""
    for each in candidates:
        each.cost = each.wait_s + each.prefill_s - (SAVING - 1.0) * each.saved_s
    return min(candidates, key=_cost)


def _cost(candidate: Candidate) -> tuple[float, int]:
    assert candidate.cost is not None
    return candidate.cost, candidate.running
