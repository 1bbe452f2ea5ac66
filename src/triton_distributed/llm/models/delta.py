"""What a caller reads of an answer: new text with its tokens, and at the end the reason and the usage."""

from __future__ import annotations

from typing import Any

import msgspec

from triton_distributed.llm.contract.output import FinishReason, Usage


class TokenText(msgspec.Struct, frozen=True):
    """A token with its text and its log-probability.

    Attributes:
        token_id: the token; -1 if only its text is known.
        text: its text; a token that is a part of a character has U+FFFD.
        bytes: its bytes of UTF-8; those of tokens that share a character are its parts.
        logprob: the natural logarithm of its probability.
        top: the most probable tokens in its place, best first; empty in an entry of `top` itself.
    """

    token_id: int
    text: str
    bytes: bytes
    logprob: float
    top: list[TokenText] = []


class Delta(msgspec.Struct):
    """The next part of an answer. The last one has a `finish_reason` and the `usage`, and only that one.

    Attributes:
        text: the new text: whole characters, and nothing that may still become a stop text.
        token_ids: the new tokens, the end token included. Tokens without text yet come with the next delta.
        logprobs: one for each token of the text, if the request asks for them.
        finish_reason: why the answer ends.
        stop_reason: the stop text or the stop token that ended it.
        reasoning, tool_calls: as in `Output`.
        usage: of the whole answer. Each token counts once, at however many workers the answer was made.
    """

    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenText] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    usage: Usage | None = None
