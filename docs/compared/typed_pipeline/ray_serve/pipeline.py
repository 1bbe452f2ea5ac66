# Run it: serve run pipeline:app
import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from ray import serve
from ray.serve.context import _get_serve_request_context
from ray.serve.handle import DeploymentHandle


@dataclass
class Question:
    text: str


@dataclass
class Prompt:
    token_ids: list[int]


@dataclass
class Token:
    id: int


@dataclass
class Piece:
    text: str


@serve.deployment
class Tokenizer:
    def tokenize(self, question: Question) -> Prompt:
        print(f"{_get_serve_request_context().request_id} tokenize", flush=True)
        return Prompt([ord(letter) for letter in question.text])


@serve.deployment(max_ongoing_requests=64)
class Model:
    async def generate(self, prompt: Prompt) -> AsyncIterator[Token]:
        print(f"{_get_serve_request_context().request_id} generate", flush=True)
        for token_id in prompt.token_ids:
            await asyncio.sleep(0.01)
            yield Token(token_id + 1)


@serve.deployment
class Frontend:
    def __init__(self, tokenizer: DeploymentHandle, model: DeploymentHandle) -> None:
        self.tokenizer = tokenizer
        self.model = model.options(stream=True)

    async def ask(self, question: Question) -> AsyncIterator[Piece]:
        print(f"{_get_serve_request_context().request_id} ask", flush=True)
        prompt = await self.tokenizer.tokenize.remote(question)
        async for token in self.model.generate.remote(prompt):
            yield Piece(chr(token.id))


app = Frontend.bind(Tokenizer.bind(), Model.bind())
