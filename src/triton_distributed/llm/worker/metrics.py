"""The state of engines, for the Prometheus page of their worker."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from triton_distributed.api.connection import Connection
from triton_distributed.llm.contract.engine import Engine

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
)
"""Attribute of `EngineMetrics`, kind, name and text. Prometheus adds `_total` to the name of a counter."""


class EngineCollector:
    """The engines of one connection, as a collector of prometheus-client."""

    def __init__(self) -> None:
        self._engines: dict[Engine, str] = {}

    def add(self, engine: Engine, model: str) -> None:
        """Show an engine with the label `model`."""
        self._engines[engine] = model

    def remove(self, engine: Engine) -> None:
        """Show it no more."""
        self._engines.pop(engine, None)

    def collect(self) -> Iterable[Metric]:
        """The metrics with their present values. Another thread than the loop's calls this."""
        core = importlib.import_module("prometheus_client.core")
        found = [(name, state) for engine, name in self._engines.copy().items() if (state := engine.metrics())]
        if not found:
            return
        for attribute, kind, name, text in FAMILIES:
            make = core.GaugeMetricFamily if kind == "gauge" else core.CounterMetricFamily
            family = make(name, text, labels=("model",))
            for model, state in found:
                family.add_metric((model,), getattr(state, attribute))
            yield family


_collectors: WeakKeyDictionary[Connection, EngineCollector] = WeakKeyDictionary()


def collector_of(connection: Connection) -> EngineCollector:
    """The collector of a connection, which is on the connection's page from the first use on."""
    found = _collectors.get(connection)
    if found is None:
        found = _collectors[connection] = EngineCollector()
        connection.metrics.add(found)
    return found
