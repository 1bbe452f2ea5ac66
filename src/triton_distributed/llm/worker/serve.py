"""`serve_model`: an engine as endpoints of a connection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from triton_distributed.api.connection import Connection
from triton_distributed.api.contracts import Stream, Unary
from triton_distributed.api.served import Served
from triton_distributed.discovery.base import Change, Snapshot
from triton_distributed.llm.contract.engine import Engine
from triton_distributed.llm.contract.errors import EngineDead, InvalidParameter, LLMError, ModelConflict
from triton_distributed.llm.contract.model import Model, ModelCard
from triton_distributed.llm.contract.output import Embeddings, Output
from triton_distributed.llm.contract.records import (
    ASSETS,
    EMBED,
    GENERATE,
    NAMESPACE,
    PREFILL,
    WATCH,
    card_of,
    differences,
    metadata_of,
)
from triton_distributed.llm.contract.request import EmbedRequest, Request
from triton_distributed.llm.contract.watching import WatchRequest, WatchUpdate
from triton_distributed.llm.worker.metrics import collector_of
from triton_distributed.llm.worker.watch import MAX_WATCHERS, Watching
from triton_distributed.names import Instance

logger = logging.getLogger("triton_distributed.llm")

CHUNK_BYTES = 1024 * 1024
"""The size of an item of the endpoint `assets`."""

YIELD_S = 5.0
"""Seconds in which a worker that began at the same time, with another card, withdraws; then this one does."""

QUEUED_PER_SLOT = 4
"""Requests that wait for each slot of the engine, if `max_queue` is not given. The next one is refused."""


class ServingModel:
    """A model that this process serves. `serve_model` makes it.

    Attributes:
        card: as it is published.
        instance: the record of its endpoint `generate`, or `prefill` for that role.
    """

    def __init__(
        self, connection: Connection, engine: Engine, card: ModelCard, served: list[Served], watching: Watching
    ) -> None:
        self.card = card
        self.instance = served[-1].instance
        self._served = served
        self._engine, self._watching = engine, watching
        self._connection = connection
        self._death: EngineDead | None = None
        self._end = connection.runtime.spawn(self._until_closed())

    async def until_drained(self) -> None:
        """Wait until the model is not served any more and its engine is closed.

        A signal, closing the connection, or `stop()` ends it; a drain comes before the end.

        Raises:
            EngineDead: the engine has died, so the model is not served any more.
            Exception: `Engine.close` raised it.
        """
        await asyncio.shield(self._end)

    async def stop(self) -> None:
        """Stop serving now: running requests are cancelled, then the engine is closed.

        Raises:
            EngineDead, Exception: as `until_drained` does.
        """
        await self._stop()
        await self.until_drained()

    def _died(self, error: EngineDead) -> None:
        """Leave at once, since no request can be answered any more. Requests that run go on at other workers."""
        if self._death is None:
            self._death = error
            logger.error("the model %r is not served any more: %s", self.card.name, error)
            self._connection.runtime.spawn(self._stop())

    async def _stop(self) -> None:
        for each in reversed(self._served):  # Front ends look at `generate`, the last one.
            await each.stop()

    async def _until_closed(self) -> None:
        """Close the engine after the last request.

        The end of the connection cancels this task, and must not cut the closing short. A second cancellation does.
        """
        for each in self._served:
            with contextlib.suppress(asyncio.CancelledError):
                await each.until_drained()
        collector_of(self._connection).remove(self._engine)
        self._watching.close()
        closing = asyncio.ensure_future(self._engine.close())
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([closing])
        await closing
        if self._death is not None:
            raise self._death

    def __repr__(self) -> str:
        return f"<ServingModel {self.card.name!r} as instance {self.instance.id}>"


async def serve_model(
    connection: Connection,
    engine: Engine,
    *,
    name: str = "",
    aliases: tuple[str, ...] = (),
    generation: int | None = None,
    namespace: str = NAMESPACE,
    max_queue: int | None = None,
) -> ServingModel:
    """Start an engine and serve its model. It can be called when this returns.

    At most `engine.slots` requests run at once. The engine is closed after the last request, and also if this fails.

    Args:
        connection: serves the endpoints.
        engine: the engine; it has not been started.
        name, aliases, generation: replace those of the engine's card, if they are given.
        namespace: of the endpoints.
        max_queue: requests that may wait beyond the slots; the next one is refused with `Overloaded`. By default 4 for
            each slot.

    Raises:
        ModelConflict: another worker serves a model of the same name and generation with another card.
        LLMError: the engine has no model, or no slot.
        DiscoveryError, OSError, InvalidName, AlreadyServed: as `Connection.serve` raises them.
        Exception: `Engine.start` raised it.
    """
    served: list[Served] = []
    watching: Watching | None = None
    try:
        watching = Watching(engine)
        await engine.start()
        changes: dict[str, Any] = {"name": name, "aliases": aliases}
        changes = {key: value for key, value in changes.items() if value}
        if generation is not None:
            changes["generation"] = generation
        model, slots = _checked(engine, changes)
        card = model.published
        await _check_before(connection, card, namespace)
        queue = QUEUED_PER_SLOT * slots if max_queue is None else max_queue
        watching.open(card)
        handlers = _Handlers(engine, card, model.assets, watching)
        place, metadata, labels = f"{namespace}.{card.component}", metadata_of(card), {"model": card.name}
        served.append(
            await connection.serve(
                Stream[str, bytes](f"{place}.{ASSETS}"), handlers.assets, metadata=metadata, metrics_labels=labels
            )
        )
        if card.embeddings and card.role != "prefill":
            served.append(
                await connection.serve(
                    Unary[EmbedRequest, Embeddings](f"{place}.{EMBED}"),
                    handlers.embed,
                    max_inflight=slots,
                    max_queue=queue,
                    metadata=metadata,
                    metrics_labels=labels,
                )
            )
        served.append(
            await connection.serve(
                Stream[WatchRequest, WatchUpdate](f"{place}.{WATCH}"),
                watching.watch,
                graceful_shutdown=False,  # It has no end of its own.
                max_inflight=MAX_WATCHERS,
                metadata=metadata,
                metrics_labels=labels,
            )
        )
        served.append(
            await connection.serve(
                Stream[Request, Output](f"{place}.{PREFILL if card.role == 'prefill' else GENERATE}"),
                handlers.generate,
                max_inflight=slots,
                max_queue=queue,
                metadata=metadata,
                metrics_labels=labels,
            )
        )
        await _check_after(connection, card, namespace)
    except BaseException:
        for each in served:
            await each.stop()
        if watching is not None:
            watching.close()
        await engine.close()
        raise
    collector_of(connection).add(engine, card.name, watching)
    serving = ServingModel(connection, engine, card, served, watching)
    handlers.open(serving._died)
    return serving


def _checked(engine: Engine, changes: dict[str, Any]) -> tuple[Model, int]:
    """The model of an engine that has started, with some fields of its card replaced, and the slots."""
    kind = type(engine).__name__
    model, slots = getattr(engine, "model", None), engine.slots
    if not isinstance(model, Model):
        raise LLMError(f"{kind}.model is not a Model: set it in __init__ or in start()")
    if changes:
        card = msgspec.structs.replace(model.card, **changes)
        engine.model = model = msgspec.structs.replace(model, card=card)
    if not model.card.name:
        raise LLMError(f"the model of {kind} has no name: set ModelCard.name")
    if type(slots) is not int or slots < 1:
        raise LLMError(f"{kind}.slots is {slots!r}: it must be a whole number of at least 1")
    return model, slots


async def _same_name(connection: Connection, card: ModelCard, namespace: str) -> list[tuple[Instance, ModelCard]]:
    """The instances that serve the name and the generation of a card, the oldest first, with their cards.

    Front ends send requests to the card of the first one (`llm/models/table.py`).
    """
    seen: list[Instance] = []

    def sink(change: Change) -> None:
        if isinstance(change, Snapshot):
            seen.extend(change.instances)

    (await connection.runtime.discovery.watch(None, sink)).close()
    found = []
    for instance in seen:
        with contextlib.suppress(ValueError):  # Its card is not readable: front ends do not list the model either.
            other = card_of(instance, namespace)
            if other and (other.name, other.generation) == (card.name, card.generation):
                found.append((instance, other))
    return sorted(found, key=lambda each: (each[0].since, each[1].digest))


def _conflict(card: ModelCard, instance: Instance, other: ModelCard) -> ModelConflict:
    by = f"instance {instance.id} at {','.join(instance.addresses)}"
    return ModelConflict(card.name, card.generation, differences(card, other), by)


async def _check_before(connection: Connection, card: ModelCard, namespace: str) -> None:
    for instance, other in await _same_name(connection, card, namespace):
        if other.digest != card.digest:
            raise _conflict(card, instance, other)


async def _check_after(connection: Connection, card: ModelCard, namespace: str) -> None:
    """Look again after registering: a worker with another card may have registered since the first look.

    Of two such workers, each sees the other one here, or the later one sees the earlier one. The younger withdraws at
    once. The older waits for that, and withdraws if the younger has looked before and stays.

    Raises:
        ModelConflict: this worker has to withdraw.
    """
    clock = asyncio.get_running_loop().time
    until = clock() + YIELD_S
    while True:
        found = await _same_name(connection, card, namespace)
        others = [each for each in found if each[1].digest != card.digest]
        if not others:
            return
        if found[0][1].digest != card.digest or clock() > until:
            raise _conflict(card, *others[0])
        await asyncio.sleep(YIELD_S / 50)


class _Handlers:
    """The handlers of a model's endpoints."""

    def __init__(self, engine: Engine, card: ModelCard, assets: dict[str, bytes], watching: Watching) -> None:
        self._engine, self._watching = engine, watching
        self._name, self._fetches = card.name, card.role == "decode"
        self._assets = assets
        self._death: EngineDead | None = None
        self._on_death: Callable[[EngineDead], None] | None = None

    def open(self, on_death: Callable[[EngineDead], None]) -> None:
        """Call this when the engine has died, and now if it has died already."""
        self._on_death = on_death
        if self._death is not None:
            on_death(self._death)

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """Answer as the engine does, and see that the answer has one end."""
        if not self._fetches:
            request.kv_transfer = None  # A worker that has refused it could; this one computes the prompt.
        stream = self._engine.generate(request)
        if not hasattr(stream, "__aiter__"):
            if asyncio.iscoroutine(stream):
                stream.close()
            raise self._broken(f"generate() returned {type(stream).__name__}: write `yield` in it")
        watching, running = self._watching, self._watching.begun(request)
        waiting, ended, answer = True, False, running.answer
        try:
            async for output in stream:
                if ended:
                    raise self._broken("an output came after the one with the finish reason")
                if not isinstance(output, Output):
                    raise self._broken(f"generate() yielded {type(output).__name__}, not Output")
                ended = output.finish_reason is not None
                if answer is not None:
                    answer += output.token_ids
                if waiting:
                    waiting = False
                    watching.computed(running, output.usage)
                if output.usage is not None:
                    watching.used(running, output.usage)
                yield output
            if not ended:
                raise self._broken("an answer ended without a finish reason")
        except EngineDead as error:
            self._died(error)
            raise
        finally:
            watching.ended(running)
            close: Callable[[], object] | None = getattr(stream, "aclose", None)
            if close is not None:
                await close()  # type: ignore[misc]

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Embed as the engine does."""
        try:
            return await self._engine.embed(request)
        except EngineDead as error:
            self._died(error)
            raise

    async def assets(self, digest: str) -> AsyncIterator[bytes]:
        """The contents that have a digest, in parts."""
        content = self._assets.get(digest)
        if content is None:
            raise InvalidParameter("digest", f"the model {self._name!r} has nothing with the digest {digest!r}")
        for start in range(0, len(content), CHUNK_BYTES):
            yield content[start : start + CHUNK_BYTES]

    def _died(self, error: EngineDead) -> None:
        self._death = error
        if self._on_death is not None:
            self._on_death(error)

    def _broken(self, reason: str) -> LLMError:
        return LLMError(f"the engine of {self._name!r}, {type(self._engine).__name__}: {reason}")
