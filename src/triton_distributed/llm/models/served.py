"""A model that workers serve, as its callers see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from triton_distributed.api.connection import Connection, target_of
from triton_distributed.api.contracts import Stream, Unary
from triton_distributed.api.targets import Target
from triton_distributed.llm.contract.errors import InvalidParameter, LLMError
from triton_distributed.llm.contract.model import ModelCard
from triton_distributed.llm.contract.output import Embeddings, Output
from triton_distributed.llm.contract.request import EmbedRequest, Request
from triton_distributed.llm.models.answer import Answer
from triton_distributed.llm.models.prompts import Prompt, Prompts
from triton_distributed.llm.models.routed import Routed
from triton_distributed.llm.models.stalls import STALL_TIMEOUT_S, StallWatch
from triton_distributed.llm.models.text import AnswerText
from triton_distributed.llm.routing.view import Decision


class ServedModel:
    """A model that workers serve.

    Args:
        connection: calls the workers.
        card: the model.
        prompts: makes its prompts, and has its tokenizer.
        created: seconds since the epoch at which the model was first seen.
        namespace: of its endpoints.
        stall_timeout_s: seconds without an output after which a worker has stalled. The first output may take four
            times as long.
        routed: chooses the workers; None to leave it to the policy of the connection.
    """

    def __init__(
        self,
        connection: Connection,
        card: ModelCard,
        prompts: Prompts,
        *,
        created: int = 0,
        namespace: str = "models",
        stall_timeout_s: float = STALL_TIMEOUT_S,
        routed: Routed | None = None,
    ) -> None:
        self.card, self.prompts, self.created, self.routed = card, prompts, created, routed
        self._connection, self._tokenizer, self._stalls = connection, prompts.tokenizer, StallWatch(stall_timeout_s)
        place = f"{namespace}.{card.component}"
        self._generate = Stream[Request, Output](f"{place}.generate")
        self._target: Target | None = None  # Of `_generate`, from its first use on.
        self._embed = Unary[EmbedRequest, Embeddings](f"{place}.embed")

    def answer(
        self, prompt: Prompt, request: Request, *, session: str = "", explain: bool = False, **call_options: Any
    ) -> Answer:
        """Ask for one answer. The call begins now, or when the router no longer holds the request.

        Args:
            prompt: the prompt.
            request: the options and limits of the answer. Its own prompt is replaced.
            session: names a conversation or a user, for policies that keep the requests of one together.
            explain: `Answer.decision` has all candidates, and not only the chosen one.
            call_options: see `StreamOptions`, without `resume`. `timeout` is for the whole answer. A `policy` chooses
                instead of the router.

        Returns:
            The deltas; see `Answer` for what they raise.

        Raises:
            TypeError, ValueError: an option is unknown or invalid.
            InvalidParameter: `logit_bias` has a token that the model lacks.
            Overloaded: the router holds too many requests.
        """
        asked = self._with(prompt, request)
        text = AnswerText(self.card, asked, prompt.tokens, self._tokenizer)
        routed = self.routed if call_options.get("policy") is None else None
        if self._target is None:
            self._target = target_of(self._connection, self._generate)
        return Answer(
            self._target,
            self.card,
            asked,
            text,
            self._stalls,
            call_options,
            routed,
            prompt.tokens,
            session,
            explain,
        )

    def explain(self, prompt: Prompt, request: Request, *, session: str = "") -> Decision | None:
        """Which worker a request would get now, and why; the arguments are those of `answer`. Nothing is booked.

        Returns:
            The decision; None without a worker, and for a model without a router.
        """
        if self.routed is None:
            return None
        return self.routed.explain(self.routed.question(self._with(prompt, request), prompt.tokens, session, True))

    def _with(self, prompt: Prompt, request: Request) -> Request:
        """The request with its prompt."""
        if (bias := request.sampling.logit_bias) and self._tokenizer is not None:
            most, vocabulary = max(bias), self._tokenizer.vocabulary
            if 0 < vocabulary <= most:
                reason = f"token id {most} is not in the vocabulary, which has {vocabulary} tokens"
                raise InvalidParameter("logit_bias", reason)
        if self._tokenizer is None:
            return msgspec.structs.replace(request, prompt=b"", text=prompt.text, messages=prompt.messages)
        return msgspec.structs.replace(request, prompt=prompt.ids, text=None, messages=None)

    async def embed(
        self, inputs: Sequence[Prompt], *, dimensions: int | None = None, model: str = "", **call_options: Any
    ) -> Embeddings:
        """Embed texts. If the worker is lost, another one gets the request.

        Args:
            inputs: a prompt for each text.
            dimensions: as in `EmbedRequest`.
            model: the name that the caller used; the card's by default.
            call_options: see `UnaryOptions`.

        Raises:
            LLMError: the engine broke its contract.
            TritonError: as `Connection.call` raises it.
        """
        request = EmbedRequest(model=model or self.card.name, dimensions=dimensions)
        if self._tokenizer is None:
            request.texts = [each.text or "" for each in inputs]
        else:
            request.prompts = [each.ids for each in inputs]
        options: dict[str, Any] = {"idempotent": True, **call_options}
        if self.routed is not None:
            options.setdefault("policy", "least_loaded")  # No cache helps here.
        found = await self._connection.call(self._embed, request, **options)
        sizes = {len(each) for each in found.vectors}
        if len(found.vectors) != len(inputs) or len(sizes) > 1 or any(size == 0 or size % 4 for size in sizes):
            raise LLMError(
                f"the engine of {self.card.name!r} answered {len(inputs)} inputs with {len(found.vectors)} vectors of "
                f"{sorted(sizes)} bytes: one vector of 32-bit floats for each was expected, all of one size"
            )
        if not found.prompt_tokens and all(each.tokens for each in inputs):
            found = Embeddings(found.vectors, sum(each.tokens for each in inputs))
        return found

    def __repr__(self) -> str:
        return f"<ServedModel {self.card.name!r}, generation {self.card.generation}>"
