"""What is known of a model: `Model` as its engine gives it, `ModelCard` as a worker publishes it."""

from __future__ import annotations

import functools
import hashlib
import re
from typing import Any, Literal

import msgspec

Continues = Literal["never", "greedy", "always"]
Role = Literal["both", "prefill", "decode"]
ROLES: tuple[Role, ...] = ("both", "prefill", "decode")

_NOT_SLUG = re.compile(r"[^a-z0-9]+")


class ModelCard(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, dict=True):
    """What a worker publishes about its model, as plain JSON in the metadata of its instance.

    Attributes:
        name: the model's name, as callers write it, e.g. `smollm2` or `org/model-7b`.
        aliases: further names.
        adapters: names of LoRA adapters, which callers use as they use the model's. The engine computes a request with
            the adapter that `Request.model` names. Requests with different adapters share no blocks of the KV cache.
        generation: counts the versions that were served under this name, from 0. New requests go to the newest one.
        context_tokens: the most tokens of prompt and answer together.
        tokenizer: the digest of the tokenizer's file; `bytes` if a token is a byte of UTF-8; empty if the engine takes
            text.
        template: the digest of the chat template; empty for a model without one.
        template_values: further variables of the template, e.g. `{"bos_token": "<s>"}`.
        eos_token_ids: the tokens that end an answer.
        chat, completions, embeddings: which routes the model answers.
        dimensions: of an embedding; 0 if the model makes none.
        max_logprobs: the most alternatives that log-probabilities may have; -1 if the engine reports none.
        guides: names of attributes of `Guide` that the engine takes.
        tools: whether the engine takes tools and answers with tool calls.
        continues: the requests that another worker can continue exactly after its own was lost: `never` any, `greedy`
            those without chance and penalties, `always` all, since each token follows from the request alone.
        extra_fields: fields of a request's body that go to the engine as they are.
        owned_by: the field of that name in `/v1/models`.
        engine: the engine's name, for people.
        kv_block_tokens: tokens in a block of its KV cache; 0 if it does not tell.
        role: what the worker does. `prefill` computes prompts for others, and gives them to workers of the role
            `decode`, which can also compute prompts themselves. Workers of one model may differ in it.
        decode_only: workers of the role `decode` compute no prompts, so each request needs a prefill worker.
    """

    name: str
    aliases: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    generation: int = 0
    context_tokens: int = 0
    tokenizer: str = ""
    template: str = ""
    template_values: dict[str, Any] = {}
    eos_token_ids: tuple[int, ...] = ()
    chat: bool = True
    completions: bool = True
    embeddings: bool = False
    dimensions: int = 0
    max_logprobs: int = -1
    guides: tuple[str, ...] = ()
    tools: bool = False
    continues: Continues = "never"
    extra_fields: tuple[str, ...] = ()
    owned_by: str = "triton-distributed"
    engine: str = ""
    kv_block_tokens: int = 0
    role: Role = "both"
    decode_only: bool = False

    @functools.cached_property  # Each request looks up its model's component.
    def digest(self) -> str:
        """The first 8 hexadecimal digits of the card's BLAKE2b. Cards have equal digests if only the role differs."""
        card = self if self.role == "both" else msgspec.structs.replace(self, role="both")
        return hashlib.blake2b(msgspec.json.encode(card, order="deterministic"), digest_size=4).hexdigest()

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """All names that callers may use."""
        return self.name, *self.aliases, *self.adapters

    @functools.cached_property
    def component(self) -> str:
        """The component whose endpoints serve the model. Different cards never share one."""
        slug = _NOT_SLUG.sub("-", self.name.lower()).strip("-")[:40] or "model"
        return f"{slug}-{self.digest}"


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine says of its model.

    Args:
        card: the card without `tokenizer` and `template`: they follow from the contents given here.
        tokenizer: the contents of a `tokenizer.json` of the library tokenizers; `bytes` for a token that is a byte of
            UTF-8; None if the engine takes text.
        template: the chat template, in Jinja; None if the model has none, or the engine takes messages.
    """

    card: ModelCard
    tokenizer: bytes | Literal["bytes"] | None = None
    template: str | None = None

    @property
    def assets(self) -> dict[str, bytes]:
        """The contents that front ends read from a worker, by digest."""
        found = {}
        if isinstance(self.tokenizer, bytes):
            found[_digest(self.tokenizer)] = self.tokenizer
        if self.template is not None:
            found[_digest(self.template.encode())] = self.template.encode()
        return found

    @property
    def published(self) -> ModelCard:
        """The card as the worker publishes it."""
        tokenizer = _digest(self.tokenizer) if isinstance(self.tokenizer, bytes) else self.tokenizer or ""
        template = "" if self.template is None else _digest(self.template.encode())
        return msgspec.structs.replace(self.card, tokenizer=tokenizer, template=template)


def _digest(content: bytes) -> str:
    return f"blake2b:{hashlib.blake2b(content, digest_size=16).hexdigest()}"
