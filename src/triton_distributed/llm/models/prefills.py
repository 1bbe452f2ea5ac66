"""The prefill workers of one model: they compute long prompts, and decode workers go on with the answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import weakref
from threading import get_ident
from typing import Any

from triton_distributed.api.connection import Connection
from triton_distributed.api.contracts import Stream
from triton_distributed.calling.item_stream import ItemStream
from triton_distributed.errors import Overloaded
from triton_distributed.llm.contract.errors import EngineStalled, LLMError
from triton_distributed.llm.contract.model import ModelCard
from triton_distributed.llm.contract.output import Output
from triton_distributed.llm.contract.records import PREFILL
from triton_distributed.llm.contract.request import Request, Sampling
from triton_distributed.llm.router.model_router import ModelRouter
from triton_distributed.llm.router.placement import Placement
from triton_distributed.llm.routing.keys import indexed_tokens
from triton_distributed.llm.routing.router import Router
from triton_distributed.llm.routing.split import split, taker, transfer_speed
from triton_distributed.llm.routing.view import Candidate, Decision, PolicyFailed, Question, RoutingPolicy

logger = logging.getLogger("triton_distributed.llm")


class Prefills:
    """Chooses which prompts prefill workers compute, and lets them do it.

    Args:
        connection: calls the workers.
        namespace: of the model's endpoints.
        card: the model.
        choice: the policy that chooses the workers, or its name; see `Router.named`.
        main: the router of the workers that generate.
        results: counts the prompts that were `handed_over`, and those that `failed` and were computed at the answer's
            worker.
        patience_s: seconds until a prefill worker must have said where the blocks are. After that, the prompt is
            computed elsewhere.

    Attributes:
        router: that of the prefill workers.
        needed: the other workers compute no prompts.
    """

    def __init__(
        self,
        connection: Connection,
        namespace: str,
        card: ModelCard,
        choice: str | RoutingPolicy,
        main: ModelRouter,
        results: dict[str, int],
        patience_s: float,
    ) -> None:
        self.router = ModelRouter(
            connection,
            (namespace, card.component),
            Router.named(choice, random.Random()),
            block_tokens=indexed_tokens(card.kv_block_tokens),
            endpoint=PREFILL,
        )
        self.main, self.name, self.connection = main, card.name, connection
        self.endpoint = Stream[Request, Output](f"{namespace}.{card.component}.{PREFILL}")
        self.transfer = transfer_speed()
        self.results, self.needed, self.patience_s = results, card.decode_only, patience_s
        self._running: set[Handover] = set()
        self._table = connection.runtime.candidates(self.endpoint.name).table
        self._table.listeners.append(self._listed)

    @property
    def unused(self) -> bool:
        """Whether no prompt can be handed over now."""
        return self.router.empty and not self.needed

    def explain(self, question: Question) -> Decision | None:
        """What would be chosen now: as the router of the workers that generate says, with `prefill` if it is elsewhere.

        Raises:
            PolicyFailed: a user's policy cannot decide.
        """
        explain, question.explain = question.explain, True  # All that could go on with it are looked at.
        try:
            decision = self.main.explain(question)
        finally:
            question.explain = explain
        there = None if decision is None else self.router.explain(question)
        if decision is None or there is None:
            return decision
        decision.prefills = there.candidates
        takers = self.takers(decision)
        if self.needed:
            found = taker(question, takers, self.transfer)
        else:
            held_s = self.main.core.held_s, self.router.core.held_s
            found = split(question, decision.chosen, there.chosen, takers, self.transfer, held_s)
        if found is not None:
            decision.chosen, decision.prefill = found, there.chosen
        return decision

    def takers(self, decision: Decision) -> list[Candidate]:
        """The candidates that can go on with a prompt that a prefill worker has computed."""
        takers = self.main.takers
        return [each for each in decision.candidates if each.worker[0] in takers]

    def place(self, question: Question, options: dict[str, Any]) -> Placement | None:
        """Let a prefill worker compute a prompt, if its first token comes sooner that way.

        Args:
            question: the request.
            options: of its call.

        Returns:
            The placement of the request, which is held until the prompt can be handed over; None to place it as usual.
        """
        if not self.needed:
            if not self.main.takers:
                return None
            try:
                decision = self.explain(question)
            except PolicyFailed:
                return None  # It fails again, and the request with it.
            if decision is None or decision.prefill is None:
                return None
        placement = Placement(self.main, question)
        placement.waiter = asyncio.get_running_loop().create_future()
        handover = placement.handover = Handover(self, placement, options)
        self._running.add(handover)
        handover.task.add_done_callback(lambda _: self._running.discard(handover))
        return placement

    async def close(self) -> None:
        """End all hand-overs and the router. Requests that wait for one fail, as the model has left."""
        self._table.listeners.remove(self._listed)
        tasks = [each.task for each in self._running]
        for each in [*self._running]:
            each.fail()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.router.close()

    def _listed(self) -> None:
        """A call waits for an instance for 10 s, and a prompt had better not."""
        if not self._table.instances and not self.needed:
            for each in [*self._running]:
                each.lose()


class Handover:
    """One prompt that a prefill worker computes, until the worker of the answer has it.

    It does not keep its placement alive: a dropped answer cancels the prefill.

    Attributes:
        task: computes, and then reads on until the prefill worker says no more.
        cached_tokens: tokens of the prompt that the prefill worker had in its cache; None if it has not told.
    """

    def __init__(self, pool: Prefills, placement: Placement, options: dict[str, Any]) -> None:
        self.cached_tokens: int | None = None
        self._pool, self._placement, self._options = pool, weakref.ref(placement), options
        self._question = placement.question
        self._loop, self._thread = asyncio.get_running_loop(), get_ident()
        self._handed: Candidate | None = None  # The worker that goes on.
        self._handed_at = self._computed_at = 0.0
        self._stream: ItemStream[Output] | None = None
        self._begun = self._lost = False  # The worker that goes on has sent an output; no prefill worker is left.
        self.task = self._loop.create_task(self._run(), name="trd-prefill")

    async def _run(self) -> None:
        try:
            await self._prefill()
            error: Exception = LLMError("the engine has not said where the blocks are")
        except asyncio.CancelledError:
            if self.task.cancelling() and not self._lost:
                raise
            self.task.uncancel()
            error = LLMError("the prefill workers have left")
        except TimeoutError:
            error = EngineStalled(self._pool.name, self._pool.patience_s)
        except Exception as failed:
            error = failed
        if self._handed is not None:
            return
        self._pool.results["failed"] += 1
        reason = str(error) or type(error).__name__
        logger.info("a prompt of model %r is not computed by a prefill worker: %s", self._pool.name, reason)
        placement = self._placement()
        if placement is None or placement.over:
            return
        if self._pool.needed:
            placement.failed(error)
        else:
            try:
                self._pool.main.submit(self._question, placement)
            except Overloaded as refused:
                placement.failed(refused)

    async def _prefill(self) -> None:
        """Let a prefill worker compute the prompt, and hand it over as soon as it says where the blocks are."""
        pool, question = self._pool, self._question
        asked = question.request
        assert isinstance(asked, Request)
        own: Placement | None = None
        try:
            async with asyncio.timeout(pool.patience_s) as limit:
                own = pool.router.submit(question)
                if own.waiter is not None:
                    await own.waiter
                request = Request(
                    model=asked.model,
                    prompt=asked.prompt,
                    max_tokens=1,
                    ignore_eos=True,
                    sampling=Sampling(temperature=0.0),
                    cache_salt=asked.cache_salt,
                    router=pool.router.id,
                    rank=own.rank,
                )
                # If the worker is lost, the answer's worker computes the prompt at once, if it can.
                options: dict[str, Any] = {**self._options, "policy": own, "idempotent": pool.needed}
                self._stream = pool.connection.stream(pool.endpoint, request, **options)
                async with self._stream as outputs:
                    async for output in outputs:
                        self._take(output, own)
                        if self._handed is not None:
                            limit.reschedule(None)
        finally:
            if own is not None:
                own.release()

    def _take(self, output: Output, own: Placement) -> None:
        if output.usage is not None:
            self.cached_tokens = output.usage.cached_tokens
        if not self._computed_at and (output.token_ids or output.finish_reason is not None):
            self._computed_at = self._loop.time()
            own.first_output(self.cached_tokens)
        if output.kv_transfer is not None and self._handed is None:
            self._hand_over(output.kv_transfer, own.decision)

    def _hand_over(self, kv_transfer: dict[str, Any], there: Decision | None) -> None:
        """Choose the worker that goes on, and let the answer begin there."""
        pool, question, placement = self._pool, self._question, self._placement()
        question.explain = True
        decision = pool.main.explain(question)
        chosen = None if decision is None else taker(question, pool.takers(decision), pool.transfer)
        if decision is None or chosen is None:
            raise LLMError("no worker can go on with it")
        self._handed, self._handed_at = chosen, self._loop.time()
        if placement is None or placement.over:
            return  # This task is about to be cancelled.
        decision.chosen = chosen
        if there is not None:
            decision.prefill, decision.prefills = there.chosen, there.candidates
        placement.kv_transfer = kv_transfer
        placement.booked(decision, pool.main.book_computed(chosen.worker, question.tokens))

    def first_output(self) -> None:
        """Note the first output of the worker that has got the prompt, and learn how long the transfer took."""
        handed, pool = self._handed, self._pool
        if handed is None or self._begun:
            return
        self._begun = True
        pool.results["handed_over"] += 1
        if self._computed_at:
            seconds = self._loop.time() - max(self._handed_at, self._computed_at)
            pool.transfer.note(self._question.tokens - handed.cached_tokens, seconds)

    def unused(self) -> None:
        """Note that the request goes on without the computed prompt, or without its worker, and end it."""
        if self._handed is not None and not self._begun:
            self._begun = True
            self._pool.results["failed"] += 1
        self.end()

    def end(self) -> None:
        """Cancel what the prefill worker still does for the request; any thread may call this."""
        if get_ident() == self._thread:
            self.task.cancel()
        else:
            with contextlib.suppress(RuntimeError):  # The loop is closed.
                self._loop.call_soon_threadsafe(self.task.cancel)

    def lose(self) -> None:
        """Let the answer's worker compute the prompt, unless a prefill worker has it."""
        if self._handed is None and (self._stream is None or not self._stream.admitted):
            self._lost = True
            self.task.cancel()

    def fail(self) -> None:
        """End it, since the model has left."""
        placement = self._placement()
        if placement is not None and self._handed is None:
            placement.release()
        self.task.cancel()
