"""What the engines vLLM and SGLang share: their options, the counted requests, and the events of their KV caches."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from triton_distributed.llm.contract.cache import Publish
from triton_distributed.llm.contract.engine import Engine, EngineMetrics
from triton_distributed.llm.engines.checkpoint import arguments
from triton_distributed.llm.engines.options import paths, read_role, whole
from triton_distributed.llm.engines.reporting import Reporting
from triton_distributed.llm.engines.running import Running

__all__: list[str] = []


class InProcessEngine(Engine):
    """Serves a model with an engine that runs in this process and batches requests by itself.

    Args:
        model: a folder, or a model of the Hugging Face hub.
        name: the name to serve it under; by default `model`.
        slots: the most requests that generate at once.
        context_tokens: the most tokens of prompt and answer together; 0 for the model's own.
        kv_events: `on` reports what the KV cache stores and removes, `off` does not. An endpoint of ZeroMQ, e.g.
            `tcp://*:5557`, lets others hear it too; several data-parallel ranks need one.
        kv_replay: with such an endpoint, another one that answers with earlier events, e.g. `tcp://*:5657`.
        role: `prefill` computes prompts for workers with the role `decode`; see `ModelCard.role`.
        adapters: LoRA adapters, as `name=path,name=path`. Callers use the name of an adapter as that of the model.
        engine_args: further arguments of the engine, as a JSON object.

    Raises:
        InvalidParameter: an option is invalid.
    """

    RANKS: ClassVar[str]
    """The engine's argument that tells how many data-parallel ranks it has."""

    def __init__(
        self,
        *,
        model: str,
        name: str = "",
        slots: str | int = 256,
        context_tokens: str | int = 0,
        kv_events: str = "on",
        kv_replay: str = "",
        role: str = "both",
        adapters: str = "",
        engine_args: str = "",
    ) -> None:
        self.slots = whole("slots", slots, 1)
        self._path, self._name = model, name or model
        self._context_tokens = whole("context_tokens", context_tokens, 0)
        self._adapters = paths("adapters", adapters)
        self._role = read_role(role)
        self._given: dict[str, Any] = arguments("engine_args", engine_args)
        self._ranks = whole(self.RANKS, self._given.get(self.RANKS, 1), 1)
        self._reporting = Reporting(kv_events, kv_replay, self._ranks)
        self._running = Running()
        self._engine: Any = None
        self._ending: set[asyncio.Task[None]] = set()  # They abort requests.

    def kv_events(self, publish: Publish) -> bool:
        """Report the events of the KV cache. See `Engine.kv_events`."""
        return self._reporting.wanted(publish)

    def metrics(self) -> EngineMetrics:
        """The requests that are in the engine now, and the tokens of those that have ended."""
        return self._reporting.added_to(self._running.metrics())

    async def close(self) -> None:
        """End the engine's processes."""
        for each in self._ending:
            each.cancel()
        await self._reporting.close()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.shutdown)
