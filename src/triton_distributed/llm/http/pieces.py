"""The parts that chunks and whole answers have in common: log-probabilities, usage, ids. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import msgspec

from triton_distributed.llm.contract.output import Usage
from triton_distributed.llm.models.delta import TokenText

to_json = msgspec.json.Encoder().encode

LEAST_LOGPROB = -9999.0
"""JSON has no infinity: the OpenAI API gives this number for a probability of 0."""


def new_id(prefix: bytes) -> bytes:
    """Return an id of an answer."""
    return b"%s-%032x" % (prefix, random.getrandbits(128))


def usage_of(parts: Sequence[tuple[int, Usage]]) -> Usage:
    """Add up the usage of a request's answers.

    Args:
        parts: the number of the prompt, and the usage of an answer to it. A prompt counts once.
    """
    if len(parts) == 1:
        return parts[0][1]
    prompts: dict[int, Usage] = {}
    for number, usage in parts:
        prompts.setdefault(number, usage)
    return Usage(
        prompt_tokens=sum(each.prompt_tokens for each in prompts.values()),
        completion_tokens=sum(usage.completion_tokens for _, usage in parts),
        cached_tokens=sum(each.cached_tokens for each in prompts.values()),
    )


def usage_json(usage: Usage) -> bytes:
    """Return the value of `usage`."""
    return (
        b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,"prompt_tokens_details":{"cached_tokens":%d}}'
        % (
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.prompt_tokens + usage.completion_tokens,
            usage.cached_tokens,
        )
    )


def chat_logprobs(tokens: Sequence[TokenText]) -> list[dict[str, Any]]:
    """Return `logprobs.content` of a chat."""
    return [{**_entry(each), "top_logprobs": [_entry(other) for other in each.top]} for each in tokens]


def _entry(token: TokenText) -> dict[str, Any]:
    return {"token": token.text, "logprob": max(token.logprob, LEAST_LOGPROB), "bytes": list(token.bytes)}


def completion_logprobs(tokens: Sequence[TokenText], offset: int) -> tuple[dict[str, Any], int]:
    """Return `logprobs` of a completion, and the offset of what follows.

    Args:
        tokens: of the text.
        offset: characters of the text before them.
    """
    offsets = []
    for each in tokens:
        offsets.append(offset)
        offset += len(each.text)
    found = {
        "tokens": [each.text for each in tokens],
        "token_logprobs": [max(each.logprob, LEAST_LOGPROB) for each in tokens],
        "top_logprobs": [
            {other.text: max(other.logprob, LEAST_LOGPROB) for other in each.top} if each.top else None
            for each in tokens
        ],
        "text_offset": offsets,
    }
    return found, offset
