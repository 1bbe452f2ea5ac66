"""Models without workers: what the OpenAI API needs of them, with a request's answer told by the test."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec

from triton_distributed.llm.contract.errors import ModelNotFound
from triton_distributed.llm.contract.model import ModelCard
from triton_distributed.llm.contract.output import Embeddings, Usage
from triton_distributed.llm.contract.request import Request
from triton_distributed.llm.models.delta import Delta, TokenText
from triton_distributed.llm.models.models import Models
from triton_distributed.llm.models.prompts import Prompt, Prompts, TokenizerThreads
from triton_distributed.llm.routing.view import Decision
from triton_distributed.llm.tokens.template import ChatTemplate
from triton_distributed.llm.tokens.tokenizer import load_tokenizer

TEMPLATE = """{% for message in messages %}{{ message.role }}:{{ message.content }}{% endfor %}\
{{ mood }}{% if add_generation_prompt %}|{% endif %}"""


class Answer:
    """The deltas of a generator; `aclose` is counted as the end of its request."""

    def __init__(self, model: StandIn, request: Request, deltas: AsyncGenerator[Delta]) -> None:
        self.model, self.request, self.deltas, self.open = model, request, deltas, True
        self.decision, self.tokens = model.decision, 3
        model.running.add(self)

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Delta:
        return await anext(self.deltas)

    async def more(self) -> Delta | None:
        return None

    async def aclose(self) -> None:
        self.model.running.discard(self)
        await self.deltas.aclose()


class StandIn:
    """A model whose answers a function gives."""

    def __init__(self, answers: Callable[[Prompt, Request], AsyncGenerator[Delta]], **card: Any) -> None:
        self.card = msgspec.convert({"name": "org/tiny", "context_tokens": 1000, "max_logprobs": 5} | card, ModelCard)
        self.created = 1_700_000_000
        template = ChatTemplate(TEMPLATE, {})
        self.prompts = Prompts(self.card, load_tokenizer("bytes"), template, TokenizerThreads())
        self.answers = answers
        self.running: set[Answer] = set()
        self.asked: list[Request] = []
        self.sessions: list[str] = []
        self.routed: Any = None
        self.decision: Decision | None = None

    def answer(self, prompt: Prompt, request: Request, session: str = "", explain: bool = False) -> Answer:
        self.asked.append(request)
        self.sessions.append(session)
        return Answer(self, request, self.answers(prompt, request))

    def explain(self, prompt: Prompt, request: Request, session: str = "") -> Decision | None:
        return self.decision

    async def embed(self, inputs, **options: Any) -> Embeddings:
        vectors = [struct.pack("<3f", each.tokens, 0.5, -1) for each in inputs]
        return Embeddings(vectors, sum(each.tokens for each in inputs))


class StandInModels(Models):
    """Models without workers. It has nothing of `Models` but its methods."""

    def __init__(self, *models: Any) -> None:
        self.models = {name: each for each in models for name in each.card.names}

    def get(self, name: str) -> Any:
        if name not in self.models:
            raise ModelNotFound(name, tuple(self.models))
        return self.models[name]

    async def has_left(self, model: Any) -> bool:
        return model not in self.models.values()

    def list(self) -> list[Any]:
        return list(dict.fromkeys(self.models.values()))


async def echo(prompt: Prompt, request: Request) -> AsyncGenerator[Delta]:
    """Answer with the tokens of the prompt, moved by the seed: a byte is a token."""
    wanted = request.sampling.logprobs
    seed = request.sampling.seed or 0
    tokens = [97 + (token + seed) % 26 for token in bytes(prompt.ids[::4])][: request.max_tokens]
    for number, token in enumerate(tokens):
        if number % 3 == 2:
            await asyncio.sleep(0)
        last = number == len(tokens) - 1
        text = chr(token)
        top = [TokenText(token, text, text.encode(), -0.25)] * (wanted or 0)
        yield Delta(
            text=text,
            token_ids=[token],
            logprobs=None if wanted is None else [TokenText(token, text, text.encode(), -0.25, top)],
            finish_reason="length" if last else None,
            usage=Usage(prompt.tokens, len(tokens), 2) if last else None,
        )
