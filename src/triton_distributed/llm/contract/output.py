"""What an engine answers: outputs with token ids or text, log-probabilities, the reason of the end, and usage."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
"""`stop`: an end token, a stop token or a stop text was met. `length`: `max_tokens` or the context is used up."""


class Candidate(msgspec.Struct, frozen=True, omit_defaults=True):
    """A token that could have been next.

    Attributes:
        token_id: the token; -1 if the engine knows only its text.
        logprob: the natural logarithm of its probability; at least -9999.
        text: its text, where the engine knows it; None to have it looked up.
    """

    token_id: int
    logprob: float
    text: str | None = None


class TokenLogprob(msgspec.Struct, frozen=True, omit_defaults=True):
    """The log-probability of a generated token.

    Attributes:
        token_id, logprob, text: as in `Candidate`.
        top: the most probable tokens, best first, as many as `Sampling.logprobs` asks for.
    """

    token_id: int
    logprob: float
    text: str | None = None
    top: list[Candidate] = []


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a request used.

    Attributes:
        prompt_tokens: tokens of the prompt, `Request.continued` ones included.
        completion_tokens: generated tokens, the end token included.
        cached_tokens: tokens of the prompt whose state was in the engine's cache.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class Output(msgspec.Struct, omit_defaults=True):
    """One step of an answer: usually one token.

    An answer is a stream of outputs. The last one has a `finish_reason`, and only that one.

    Attributes:
        token_ids: the new tokens. The end token may be among them, as the last one: it is not part of the text.
        text: the new text, from engines that make text themselves; None to have it made from `token_ids`.
        logprobs: one for each of `token_ids`, if the request asks for them.
        finish_reason: why the answer ends; None before the last output.
        stop_reason: the token id or the text that ended it, if it was one of the request's.
        usage: in the last output. Without it, the tokens are counted outside of the engine, and none counts as cached.
            It may be in earlier ones too: if the worker is lost, its last `cached_tokens` count for the whole answer.
        reasoning: new text of the model's reasoning, where the engine separates it.
        tool_calls: new parts of tool calls, as `delta.tool_calls` in a chunk of the OpenAI API.
        kv_transfer: of an engine with the role `prefill`: what another engine needs to get the blocks of the prompt.
            The request goes there with the first output that has it, even if the blocks are not computed yet. The
            stream may go on until they have been fetched; if it is closed before, the request has been cancelled.
    """

    token_ids: list[int] = []
    text: str | None = None
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    usage: Usage | None = None
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    kv_transfer: dict[str, Any] | None = None


class Embeddings(msgspec.Struct, frozen=True):
    """The answer to an `EmbedRequest`.

    Attributes:
        vectors: one for each input: little-endian 32-bit floats.
        prompt_tokens: tokens of all inputs.
    """

    vectors: list[bytes]
    prompt_tokens: int
