"""What this room needs of the models: `llm/models` has it, and tests have simpler ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from triton_distributed.llm.contract.model import ModelCard
from triton_distributed.llm.contract.output import Embeddings, Usage
from triton_distributed.llm.contract.request import Request


class TokenText(Protocol):
    """A token with its text, its bytes and its log-probability."""

    @property
    def text(self) -> str: ...
    @property
    def bytes(self) -> bytes: ...
    @property
    def logprob(self) -> float: ...
    @property
    def top(self) -> Sequence[TokenText]: ...


class Delta(Protocol):
    """The next part of an answer. The last one has a `finish_reason` and the `usage`."""

    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def logprobs(self) -> Sequence[TokenText] | None: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def stop_reason(self) -> int | str | None: ...
    @property
    def reasoning(self) -> str | None: ...
    @property
    def tool_calls(self) -> list[dict[str, Any]] | None: ...
    @property
    def usage(self) -> Usage | None: ...


class Answer(Protocol):
    """An asynchronous iterator of deltas. `aclose` ends the request at the worker."""

    def __aiter__(self) -> Answer: ...
    async def __anext__(self) -> Delta: ...
    async def aclose(self) -> None: ...


class Prompt(Protocol):
    """A prompt in the form that the model's engine takes; `tokens` is 0 if their number is not known."""

    @property
    def ids(self) -> bytes: ...
    @property
    def text(self) -> str | None: ...
    @property
    def messages(self) -> list[dict[str, Any]] | None: ...
    @property
    def tokens(self) -> int: ...


class Prompts(Protocol):
    """Makes the prompts of a model."""

    async def chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        template_values: dict[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> Any: ...
    async def text(self, text: str, *, param: str = "prompt") -> Any: ...
    def ids(self, token_ids: list[int], *, param: str = "prompt") -> Any: ...


class ServedModel(Protocol):
    """A model that workers serve."""

    @property
    def card(self) -> ModelCard: ...
    @property
    def created(self) -> int: ...
    @property
    def prompts(self) -> Any: ...
    def answer(self, prompt: Any, request: Request, **options: Any) -> Any: ...
    async def embed(self, inputs: Any, **options: Any) -> Embeddings: ...


class Models(Protocol):
    """The models that are served now."""

    def get(self, name: str, /) -> Any: ...
    def list(self) -> Any: ...
