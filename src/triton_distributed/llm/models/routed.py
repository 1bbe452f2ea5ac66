"""How the requests of one model get their workers: its router, and what is counted of the choices."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Final

from triton_distributed.api.connection import Connection
from triton_distributed.llm.contract.model import ModelCard
from triton_distributed.llm.contract.request import Request
from triton_distributed.llm.models.prefills import Prefills
from triton_distributed.llm.models.route_counts import counts_of
from triton_distributed.llm.models.stalls import FIRST, STALL_TIMEOUT_S
from triton_distributed.llm.router.model_router import ModelRouter, WorkerState
from triton_distributed.llm.router.placement import Placement
from triton_distributed.llm.routing.keys import block_keys, indexed_tokens, seed_of
from triton_distributed.llm.routing.router import Router
from triton_distributed.llm.routing.view import Decision, Question, RoutingPolicy

CHECKED: Final = 1 / 64
"""The part of the choices for which the index is looked up in the slow way, too, to compare the two."""


class Routed:
    """The router of one model, with its counts.

    Args:
        connection: calls the workers.
        namespace: of the model's endpoints.
        card: the model.
        choice: the policy that chooses the workers, or its name; see `Router.named`.
        stall_timeout_s: a prefill worker has stalled after four times as many seconds.

    Attributes:
        router: chooses and books.
        prefills: those of prompts that other workers compute.
        policy: the policy's name.
        counts: what is counted of its choices.
    """

    def __init__(
        self,
        connection: Connection,
        namespace: str,
        card: ModelCard,
        choice: str | RoutingPolicy,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        self._rng = random.Random()
        core = Router.named(choice, self._rng)
        self.policy = core.policy
        self.router = ModelRouter(
            connection,
            (namespace, card.component),
            core,
            block_tokens=indexed_tokens(card.kv_block_tokens),
        )
        self.counts = counts_of(connection).of_model(card.name, core)
        results, patience_s = self.counts.prefills, FIRST * stall_timeout_s
        self.prefills = Prefills(connection, namespace, card, choice, self.router, results, patience_s)
        self._adapters = frozenset(card.adapters)
        self._hashed: tuple[bytes, str, str, int, Sequence[int]] = (b"", "", "", 0, ())  # The last prompt and its keys.

    def question(self, request: Request, tokens: int, session: str, explain: bool = False) -> Question:
        """What the policy needs to know of a request.

        Args:
            request: the request with its prompt.
            tokens: of the prompt; 0 if they are not known.
            session: names a conversation or a user; empty for none.
            explain: the decision has all candidates.
        """
        prompt, salt, size = request.prompt, request.cache_salt, self.router.block_tokens
        lora = request.model if request.model in self._adapters else ""
        keys: Sequence[int] = ()
        if len(prompt) >= 4 * size:
            known = self._hashed
            if known[0] is prompt and known[1:4] == (lora, salt, size):  # One of several answers to one prompt.
                keys = known[4]
            else:
                keys = block_keys(prompt, size, seed_of(lora, salt))
                self._hashed = prompt, lora, salt, size, keys
        return Question(
            tokens=tokens or 1, keys=keys, block_tokens=size, request=request, session=session, explain=explain
        )

    def place(self, question: Question, options: dict[str, Any]) -> Placement:
        """Choose a worker and book it, or hold the request; see `ModelRouter.submit`.

        Args:
            question: the request.
            options: of its call, if a prefill worker is called before.

        Raises:
            Overloaded: too many requests are held.
        """
        if question.keys and self._rng.random() < CHECKED:
            index = self.router.core.index
            self.counts.checked(index.depths(question.keys) == index.walked_depths(question.keys))
        if self.prefills.unused:
            return self.router.submit(question)
        return self.prefills.place(question, options) or self.router.submit(question)

    def held(self, decision: Decision) -> None:
        """Note that a request was held before it got its worker."""
        if decision.held_s:
            self.counts.held.add(decision.held_s)

    def begun(self, decision: Decision) -> None:
        """Note the first output of the worker that was chosen."""
        self.counts.chosen(decision)

    def measured(self, cached_tokens: int) -> None:
        """Note the tokens of a prompt that were in the worker's cache, as its engine says."""
        self.counts.measured.add(cached_tokens)

    def explain(self, question: Question) -> Decision | None:
        """What would be chosen now; None without a worker. Nothing is booked."""
        return self.prefills.explain(question)

    def states(self) -> list[WorkerState]:
        """What is known of each worker."""
        return [*self.router.states(), *self.prefills.router.states()]

    async def close(self) -> None:
        """End the router. Requests that it holds fail, as the model has left."""
        self.counts.end()
        await self.prefills.close()
        await self.router.close()
