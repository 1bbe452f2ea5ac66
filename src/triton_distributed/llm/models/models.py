"""`Models`: the models that are served, by name."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import random
from typing import Self

from triton_distributed.api.connection import Connection
from triton_distributed.errors import NoInstances
from triton_distributed.llm.contract.errors import LLMError, ModelNotFound, PrefillOnly
from triton_distributed.llm.contract.records import NAMESPACE
from triton_distributed.llm.models.routed import Routed
from triton_distributed.llm.models.served import ServedModel
from triton_distributed.llm.models.stalls import STALL_TIMEOUT_S
from triton_distributed.llm.models.table import Entry
from triton_distributed.llm.models.watch import ModelWatch
from triton_distributed.llm.routing.policies.named import policy_named
from triton_distributed.llm.routing.view import RoutingPolicy
from triton_distributed.routing.load import LoadBook

NEWS_S = 1.0
"""Seconds that the news of a worker's end may take, from the worker to this process."""

LEARN_S = 0.25
"""Seconds that routers have to learn what caches hold, before the first request. It is enough for 100,000 blocks."""


class Models:
    """The models that are served now: `async with Models(connection) as models`.

    A model is listed when its tokenizer is loaded. When the block begins, those that were served before may still be
    loading: `wait_for` waits for one.

    Args:
        connection: calls the workers.
        namespace: of the models' endpoints.
        stall_timeout_s: seconds without an output after which a worker counts as stalled; see `ServedModel`.
        routing: the policy that chooses the worker of each request: `kv`, `kv_linear`, `prefix_hash`, `session`, one of
            the runtime's, or a function of your own; see docs/llm/routing.md. None leaves the choice to the policy of
            the connection, which knows nothing of prompts.

    Raises:
        ConfigError: there is no such policy.

    Attributes:
        expected: names of models whose workers start again when they end. Such a model is not unknown while none runs.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        namespace: str = NAMESPACE,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        routing: str | RoutingPolicy | None = "kv",
    ) -> None:
        self._connection, self._namespace, self._stall_timeout_s = connection, namespace, stall_timeout_s
        if routing is not None:
            policy_named(routing, random.Random(), LoadBook())  # A wrong name raises now.
        self._routing = routing
        self._closing: set[asyncio.Task[None]] = set()
        # A router begins when its model is loaded: it knows the workers' caches before the first request.
        self._watch = ModelWatch(connection, namespace, self._left, self.list)
        self._served: dict[str, ServedModel] = {}
        self.expected: frozenset[str] = frozenset()

    async def __aenter__(self) -> Self:
        try:
            await self._watch.open()
        except BaseException:
            await self._watch.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._watch.close()
        for component in [*self._served]:
            self._left(component)
        await asyncio.gather(*self._closing)

    def get(self, name: str) -> ServedModel:
        """The newest generation of a model.

        Args:
            name: its name or an alias.

        Raises:
            ModelNotFound: no model of this name is listed.
            NoInstances: the same, of an `expected` name.
            PrefillOnly: the same, of a model whose workers all have the role `prefill`.
            LLMError: it is served, and its tokenizer or template cannot be used in this process.
        """
        ranked = self._watch.table.ranked()
        entries = ranked.get(name, ())
        for entry in entries:
            if (found := self._of(entry)) is not None:
                return found
        for entry in entries:
            if (reason := self._watch.unusable.get(entry.card.component)) is not None:
                raise LLMError(f"the model {name!r} is served, and cannot be used in this process: {reason}")
        if not entries and name in self._watch.table.prefill_only():
            raise PrefillOnly(name)
        if name in self.expected:
            raise NoInstances(f"the model {name!r}")
        raise ModelNotFound(name, [each.card.name for each in self.list()])

    def list(self) -> builtins.list[ServedModel]:
        """The newest generation of each model, by name. Aliases are in their cards."""
        found = {}
        for entries in self._watch.table.ranked().values():
            for entry in entries:
                if entry.card.name not in found and (model := self._of(entry)) is not None:
                    found[entry.card.name] = model
        return [found[name] for name in sorted(found)]

    async def has_left(self, model: ServedModel) -> bool:
        """Whether the last worker of a model has left; a later model of this name is another one.

        A worker that ends refuses requests, and discovery may tell of its end a little later. So this waits for the
        news, for `NEWS_S` at most.
        """
        component = model.card.component
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NEWS_S):
                while self._watch.prompts.get(component) is model.prompts:
                    await self._watch.changed.wait()
        return self._watch.prompts.get(component) is not model.prompts

    async def wait_for(self, name: str, timeout: float | None = None) -> ServedModel:
        """Wait until a model is listed.

        Args:
            name: its name or an alias.
            timeout: seconds; None for no limit.

        Raises:
            ModelNotFound, NoInstances, PrefillOnly: the time is over.
            LLMError: as `get` raises it.
        """
        try:
            async with asyncio.timeout(timeout):
                while True:
                    changed = self._watch.changed
                    try:
                        return self.get(name)
                    except (ModelNotFound, NoInstances, PrefillOnly):
                        await changed.wait()
        except TimeoutError:
            return self.get(name)

    async def until_loaded(self, timeout_s: float) -> None:
        """Wait until the models that are served now are loaded, or cannot be; at most for a time.

        A program that accepts requests only then does not call a model unknown that is served already. Their routers
        have `LEARN_S` more to learn what the workers' caches hold.

        Args:
            timeout_s: seconds; a model whose workers are lost is tried again without end.
        """
        await self._watch.until_loaded(timeout_s)
        routed = [each.routed for each in self.list() if each.routed is not None]
        routers = [router for each in routed for router in (each.router, each.prefills.router)]
        await asyncio.gather(*(each.until_whole(LEARN_S) for each in routers))

    def _of(self, entry: Entry) -> ServedModel | None:
        """The model of an entry; None if it is not loaded."""
        component = entry.card.component
        prompts = self._watch.prompts.get(component)
        if prompts is None:
            return None
        known = self._served.get(component)
        if known is None or known.prompts is not prompts:
            self._left(component)
            routed = None
            if self._routing is not None:
                routed = Routed(self._connection, self._namespace, entry.card, self._routing, self._stall_timeout_s)
            known = self._served[component] = ServedModel(
                self._connection,
                entry.card,
                prompts,
                created=entry.created,
                namespace=self._namespace,
                stall_timeout_s=self._stall_timeout_s,
                routed=routed,
            )
        return known

    def _left(self, component: str) -> None:
        """Forget a model whose last worker has left, and end its router."""
        gone = self._served.pop(component, None)
        if gone is not None and gone.routed is not None:
            closing = asyncio.get_running_loop().create_task(gone.routed.close(), name="trd-router-close")
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
