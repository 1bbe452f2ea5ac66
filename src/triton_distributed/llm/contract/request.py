"""What an engine is asked: token ids or text, with options of sampling, stop conditions and limits."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import Any

import msgspec

PLAIN_BYTES = 16 * 1024
"""Smaller prompts travel inside of the request, and larger ones next to it, as the runtime's codec decides."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen. The defaults are those of the OpenAI API, without its restrictions.

    Attributes:
        temperature: 0 takes the most probable token (greedy); above 0 divides the logits, at most 2.
        top_p: choose among the most probable tokens whose probabilities add up to this; 1 for all.
        top_k: choose among this many most probable tokens; 0 for all.
        min_p: leave out tokens whose probability is below this part of the most probable one's; 0 for none.
        presence_penalty: subtracted from the logit of each token that the answer has, from -2 to 2.
        frequency_penalty: subtracted from that logit once for each time, from -2 to 2.
        repetition_penalty: divides positive logits of tokens of prompt and answer, and multiplies negative ones; 1 for
            none. CTRL, arXiv 1909.05858, section 4.1.
        seed: makes the choice repeatable; None for a random one.
        logit_bias: added to the logits of these token ids, from -100 to 100.
        logprobs: report the log-probability of each token, and of this many most probable ones; None for no report.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logit_bias: dict[int, float] | None = None
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether each token follows from the tokens before it, without chance."""
        return self.temperature == 0 or self.top_k == 1


class Guide(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The form that an answer must have. Exactly one attribute is set, besides `field`.

    Attributes:
        json: any JSON object.
        schema: JSON that fits this JSON schema.
        regex: text that this regular expression matches.
        choice: one of these texts.
        grammar: text of this grammar, in the engine's notation.
        field: the field of the request that asked for it, for an engine that refuses it.
    """

    json: bool = False
    schema: dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    field: str = "guide"


class Request(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One answer to generate.

    The prompt is in one of three forms. Token ids are the usual form. A model without a tokenizer (`Model.tokenizer`)
    gets text instead, and one that also has no template gets chat messages.

    Attributes:
        model: the name that the caller used: the model's name, or one of its aliases or adapters.
        prompt: the token ids, 4 bytes each, little-endian; see `token_ids`.
        text: the prompt as text; None if the prompt has another form.
        messages: the chat messages, as the OpenAI API defines them; None if the prompt has another form.
        continued: how many of the last token ids of the prompt belong to the answer: another worker generated them
            before it was lost. The engine goes on after them and does not repeat them. `max_tokens` and `min_tokens`
            count only new tokens.
        max_tokens: the most tokens to generate, at least 1. It fits the context length.
        min_tokens: end tokens and stop texts do not count before this many tokens.
        stop: texts that end the answer. They are looked for outside of the engine too, so an engine may ignore them.
        stop_token_ids: tokens that end the answer, besides the model's end tokens.
        ignore_eos: the model's end tokens do not end the answer.
        sampling: how the next token is chosen.
        guide: the form that the answer must have; None for any. Only engines whose model says so get one.
        tools, tool_choice, parallel_tool_calls: as the OpenAI API defines them, for models with `tools`.
        extra: further fields of the HTTP request that the model names in `extra_fields`, e.g. for a proxy engine.
        cache_salt: requests with different salts share no blocks of the KV cache. An engine with such a cache heeds it.
        router: the id of the front end's router that has chosen the worker; 0 for none.
        rank: the data-parallel rank that it has chosen inside of the worker; 0 for an engine without ranks.
        kv_transfer: where the blocks of the prompt are, which a prefill worker has computed, as its engine says in
            `Output.kv_transfer`; None to compute the prompt here. Only workers of the role `decode` get it.
    """

    model: str = ""
    prompt: bytes = b""
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    continued: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    sampling: Sampling = Sampling()
    guide: Guide | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    extra: dict[str, Any] = {}
    cache_salt: str = ""
    router: int = 0
    rank: int = 0
    kv_transfer: dict[str, Any] | None = None

    @property
    def token_ids(self) -> array[int]:
        """The prompt as an array of 32-bit numbers; a new one at each use. It takes 20 µs for 60,000 tokens."""
        return unpacked(self.prompt)


_encode = msgspec.msgpack.Encoder().encode


def encoded(request: Request) -> bytes | None:
    """The bytes of a request that holds text, numbers and a prompt below `PLAIN_BYTES` only; None for any other.

    The codec of the runtime makes the same bytes, after a search for memory, which takes 4 µs.
    """
    if (
        len(request.prompt) >= PLAIN_BYTES
        or type(request.prompt) is not bytes
        or request.messages is not None
        or request.tools is not None
        or request.tool_choice is not None
        or request.guide is not None
        or request.extra
        or request.kv_transfer is not None
    ):
        return None
    try:
        return _encode(request)
    except Exception:  # The runtime's codec finds out why.
        return None


class EmbedRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Texts to embed, in one of two forms.

    Attributes:
        model: the name that the caller used.
        prompts: token ids of each input, packed as in `Request.prompt`.
        texts: the inputs as text, for a model without a tokenizer.
        dimensions: the number of dimensions that is asked for; None for the model's own.
    """

    model: str = ""
    prompts: list[bytes] = []
    texts: list[str] = []
    dimensions: int | None = None


def packed(token_ids: Iterable[int]) -> bytes:
    """Pack token ids: 4 bytes each, little-endian.

    Raises:
        OverflowError: an id is below 0 or above 2**32 - 1.
        TypeError: an id is not a whole number.
    """
    found = array("I", token_ids)
    if sys.byteorder == "big":
        found.byteswap()
    return found.tobytes()


def unpacked(prompt: bytes) -> array[int]:
    """Unpack token ids.

    Raises:
        ValueError: the length is not a multiple of 4.
    """
    found = array("I")
    found.frombytes(prompt)
    if sys.byteorder == "big":
        found.byteswap()
    return found
