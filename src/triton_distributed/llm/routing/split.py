"""Pools for prefill and decode: whether a prefill worker computes a prompt, and which worker goes on with it. Pure.

A long prefill delays every answer that its worker generates. A prefill worker generates none. So a prompt is computed
there if its first token comes sooner that way, the delay of the other answers included. A short prompt, one that is
cached, and one for which the prefill workers have too much to do stay where the answer is.
"""

from __future__ import annotations

from collections.abc import Iterable

from triton_distributed.llm.routing.policies.kv import ACTIVE_S
from triton_distributed.llm.routing.speed import PrefillSpeed
from triton_distributed.llm.routing.view import Candidate, Question

OTHERS = 0.25
"""How much a second of a prefill counts by which other answers are delayed, beside a second until the first token.

Not for each of them: however many there are, the same part of a worker's tokens comes late. Decision 9 has the figures.
"""

TRANSFER = (0.005, 5e-6, 0.0)
"""Seconds, seconds a token, and seconds a token squared, of a transfer of which nothing is known yet. A model of 8
billion parameters has 128 KiB a token, so 5 µs are 26 GB/s."""


def transfer_speed() -> PrefillSpeed:
    """How long it takes to hand over the KV cache of a prompt, up to the first token; to be fitted online."""
    return PrefillSpeed(prior=TRANSFER)


def split(
    question: Question,
    here: Candidate,
    there: Candidate,
    takers: Iterable[Candidate],
    transfer: PrefillSpeed,
    held_s: tuple[float, float] = (0.0, 0.0),
) -> Candidate | None:
    """Decide where a prompt is computed.

    Args:
        question: the request.
        here: the worker that would compute the prompt and generate the answer.
        there: the best prefill worker for the prompt.
        takers: workers that can go on with a prompt that another one has computed.
        transfer: how long a transfer takes.
        held_s: `Router.held_s` of those of `here` and `there`. The waits have the first held requests only.

    Returns:
        The worker that goes on after the prefill `there`; None if the request goes `here` as a whole.
    """
    found = taker(question, takers, transfer)
    if found is None:
        return None
    delay_s = OTHERS * here.prefill_s if here.running else 0.0
    elsewhere_s = held_s[1] + there.wait_s + there.prefill_s + transfer_s(question, found, transfer)
    return found if elsewhere_s < held_s[0] + here.wait_s + here.prefill_s + delay_s else None


def taker(question: Question, takers: Iterable[Candidate], transfer: PrefillSpeed) -> Candidate | None:
    """Choose the worker that goes on with a computed prompt; None without any.

    The least of its wait, the transfer of what it does not hold, and the time of longer steps.
    """
    least, chosen = 0.0, None
    for each in takers:
        cost = each.wait_s + transfer_s(question, each, transfer) + ACTIVE_S * each.active_tokens
        if chosen is None or cost < least or (cost == least and each.running < chosen.running):
            least, chosen = cost, each
    return chosen


def transfer_s(question: Question, to: Candidate, transfer: PrefillSpeed) -> float:
    """Seconds to hand over what a worker does not hold of a prompt."""
    return transfer.seconds(question.tokens - to.cached_tokens)
