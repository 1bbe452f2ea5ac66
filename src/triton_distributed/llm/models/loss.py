"""What an answer does after its worker was lost or has stalled. One pure function decides."""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple

from triton_distributed.llm.contract.model import Continues
from triton_distributed.llm.contract.request import Request

MOST_LOSSES = 3
"""The most workers in a row that an answer may lose without a new token: a request that crashes its engine is not
sent to the whole fleet."""


class Progress(NamedTuple):
    """What the caller has of the answer.

    Attributes:
        tokens: tokens of it.
        engine_text: whether the engine made a part of the text, the reasoning or the tool calls itself.
        ended: the last token ends the answer.
        losses: workers lost in a row without a new token, this one included.
    """

    tokens: int
    engine_text: bool
    ended: bool
    losses: int


class Next(Enum):
    """What to do."""

    AGAIN = auto()  # Send the request as it was.
    CONTINUE = auto()  # Send the prompt with the tokens so far.
    STOPPED = auto()  # The answer is complete: its last token is an end token.
    LENGTH = auto()  # The answer is complete: it has `max_tokens`.


def decide(request: Request, continues: Continues, progress: Progress) -> Next | str:
    """Return what the answer does next, or the reason why it fails.

    Args:
        request: the request as it was sent first.
        continues: of the model's card.
        progress: what the caller has.
    """
    seen = progress.tokens > 0 or progress.engine_text
    if seen and not progress.engine_text:  # Whether it is complete does not depend on the engine.
        if progress.ended:
            return Next.STOPPED
        if progress.tokens >= request.max_tokens:
            return Next.LENGTH
    if progress.losses > MOST_LOSSES:
        return f"{progress.losses} workers in a row were lost with it without a new token"
    if not seen:
        return Next.AGAIN
    if progress.engine_text:
        return "the engine makes the text itself, and its state was lost with it"
    if request.guide is not None:
        return "the answer has a guide, whose state was lost with the engine"
    if request.tools:
        return "the answer may have tool calls, whose state was lost with the engine"
    return _unrepeatable(request, continues) or Next.CONTINUE


def _unrepeatable(request: Request, continues: Continues) -> str:
    """Return why another worker could go on with other tokens; empty if it cannot."""
    sampling = request.sampling
    if continues == "always":
        return ""
    if continues == "never":
        return "the model's engine cannot continue an answer"
    if not sampling.greedy:
        return "its tokens are drawn by chance (temperature above 0), and the engine continues only greedy answers"
    if sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1:
        return "its tokens have penalties, and the engine continues only answers without them"
    if sampling.logprobs is not None:
        return "it has log-probabilities, which would change a little at another worker"
    return ""
