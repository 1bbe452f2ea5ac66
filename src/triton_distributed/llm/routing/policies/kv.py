"""The policy `kv`: the least time, with what a cached block saves counted five times."""

from __future__ import annotations

from collections.abc import Sequence

from triton_distributed.llm.routing.view import Candidate, Question

SAVING = 5.0
"""How often a saved second counts: requests that queue later profit from it, too. Decision 9 has the measurements."""

ACTIVE_S = 2e-7
"""Seconds for each token of the prompts at a worker, which make its steps longer. So requests without a wait spread."""


def kv(question: Question, candidates: Sequence[Candidate]) -> Candidate:
    """The candidate with the least `wait_s + prefill_s - (SAVING - 1) * saved_s + ACTIVE_S * active_tokens`."""
    least, chosen = 0.0, None
    for each in candidates:
        cost = each.cost = each.wait_s + each.prefill_s - (SAVING - 1.0) * each.saved_s + ACTIVE_S * each.active_tokens
        if chosen is None or cost < least or (cost == least and each.running < chosen.running):
            least, chosen = cost, each
    assert chosen is not None
    return chosen
