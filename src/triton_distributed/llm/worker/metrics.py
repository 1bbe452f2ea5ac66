"""The state of engines and what is known of their caches, for the Prometheus page of their worker."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from triton_distributed.api.connection import Connection
from triton_distributed.llm.contract.engine import Engine
from triton_distributed.llm.worker.watch import Watching

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

FAMILIES = (
    ("active", "gauge", "triton_llm_requests_active", "Requests that generate."),
    ("waiting", "gauge", "triton_llm_requests_waiting", "Requests that wait inside the engine."),
    ("kv_blocks_used", "gauge", "triton_llm_kv_blocks_used", "Blocks of the KV cache in use."),
    ("kv_blocks_total", "gauge", "triton_llm_kv_blocks", "Blocks of the KV cache."),
    ("prompt_tokens", "counter", "triton_llm_prompt_tokens", "Tokens of prompts."),
    ("cached_tokens", "counter", "triton_llm_cached_tokens", "Tokens of prompts that were in the KV cache."),
    ("generated_tokens", "counter", "triton_llm_generated_tokens", "Generated tokens."),
    ("preemptions", "counter", "triton_llm_preemptions", "Requests that lost their blocks to others."),
    ("kv_unread", "counter", "triton_llm_kv_unread", "Events of the KV cache that could not be read."),
    ("kv_lost", "counter", "triton_llm_kv_lost", "Times that events were lost and the KV cache became unknown."),
)
"""Attribute of `EngineMetrics`, kind, name and text. Prometheus adds `_total` to the name of a counter."""


CACHE_FAMILIES = (
    ("exact", "gauge", "triton_llm_kv_exact", "1 if routing knows the KV cache by its engine's events, otherwise 0."),
    ("silent", "gauge", "triton_llm_kv_silent", "1 if the engine should report its KV cache and does not."),
    ("known", "gauge", "triton_llm_kv_known_blocks", "Blocks that the KV cache holds, as far as routing knows."),
    ("watchers", "gauge", "triton_llm_kv_watchers", "Routers that follow the KV cache."),
    ("snapshots", "counter", "triton_llm_kv_snapshots", "Times that a router was sent the whole KV cache."),
    ("events", "counter", "triton_llm_kv_events", "Events of the KV cache that the engine has reported."),
    ("unusable", "counter", "triton_llm_kv_unusable", "Blocks in events that could not be used."),
    ("asked", "counter", "triton_llm_kv_asked_tokens", "Tokens of prompts for which the next two are known."),
    ("believed", "counter", "triton_llm_kv_believed_tokens", "Of these, tokens that were believed to be cached."),
    ("measured", "counter", "triton_llm_kv_measured_tokens", "Of these, tokens that were cached, says the engine."),
)
"""The same for attributes of `Watching`. The last three are counted in the approximate mode."""


class EngineCollector:
    """The engines of one connection, as a collector of prometheus-client."""

    def __init__(self) -> None:
        self._engines: dict[Engine, tuple[str, Watching]] = {}

    def add(self, engine: Engine, model: str, watching: Watching) -> None:
        """Show an engine with the label `model`, and what is known of its cache."""
        self._engines[engine] = model, watching

    def remove(self, engine: Engine) -> None:
        """Show it no more."""
        self._engines.pop(engine, None)

    def kv_events(self) -> str | None:
        """What is wrong with the engines' events, for `/health`. Any thread may call this."""
        return "; ".join(filter(None, (each.problem() for _, each in self._engines.copy().values()))) or None

    def collect(self) -> Iterable[Metric]:
        """The metrics with their present values. Another thread than the loop's calls this."""
        engines = self._engines.copy().items()
        states = [(name, state) for engine, (name, _) in engines if (state := engine.metrics())]
        yield from _families(FAMILIES, states)
        yield from _families(CACHE_FAMILIES, [each for _, each in engines])


def _families(described: Sequence[tuple[str, str, str, str]], states: Sequence[tuple[str, Any]]) -> Iterable[Metric]:
    if not states:
        return
    core = importlib.import_module("prometheus_client.core")
    for attribute, kind, name, text in described:
        make = core.GaugeMetricFamily if kind == "gauge" else core.CounterMetricFamily
        family = make(name, text, labels=("model",))
        for model, state in states:
            family.add_metric((model,), getattr(state, attribute))
        yield family


_collectors: WeakKeyDictionary[Connection, EngineCollector] = WeakKeyDictionary()


def collector_of(connection: Connection) -> EngineCollector:
    """The collector of a connection, which is on the connection's page from the first use on."""
    found = _collectors.get(connection)
    if found is None:
        found = _collectors[connection] = EngineCollector()
        connection.metrics.add(found)
        connection.health_check(found.kv_events)
    return found
