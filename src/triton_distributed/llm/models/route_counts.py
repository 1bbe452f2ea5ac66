"""What is counted of the choices of workers, as metrics for Prometheus. docs/llm/routing.md lists them.

They are plain numbers that the event loop counts.
"""

from __future__ import annotations

import importlib
from bisect import bisect_left
from collections.abc import Iterable
from math import inf
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from triton_distributed.api.connection import Connection
from triton_distributed.llm.routing.router import Router
from triton_distributed.llm.routing.view import Decision, Mode

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

_TOKENS = (0.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, inf)
_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, inf)
MODES: tuple[Mode, ...] = ("exact", "approximate", "off")


class Buckets:
    """Counts values by their size.

    Args:
        bounds: the upper bounds of the buckets, each inclusive; the last one is infinite.
    """

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._counts, self._total = bounds, [0] * len(bounds), 0.0

    def add(self, value: float) -> None:
        """Count one. It is called often."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """The values up to each bound, and the sum of all."""
        found, upto = [], 0
        for bound, count in zip(self._bounds, self._counts, strict=True):
            upto += count
            found.append(("+Inf" if bound == inf else str(bound), float(upto)))
        return found, self._total


class ModelCounts:
    """What is counted of one model.

    Attributes:
        believed: tokens of prompts that the chosen worker was thought to hold.
        measured: tokens of prompts that engines have found in their caches.
        held: seconds that requests were held, of those that were.
        prefills: prompts that prefill workers should compute, by the result.
        core: the present router of the model; None after its end.
    """

    def __init__(self) -> None:
        self.believed, self.measured, self.held = Buckets(_TOKENS), Buckets(_TOKENS), Buckets(_SECONDS)
        self.prefills = {"handed_over": 0, "failed": 0}
        self.decisions: dict[tuple[str, str], int] = {}
        self.checks = [0, 0]
        self.core: Router | None = None
        self.dropped = 0  # Of earlier routers.

    def chosen(self, decision: Decision) -> None:
        """Count a choice whose worker has begun to answer."""
        chosen = decision.chosen
        key = decision.policy, chosen.mode
        self.decisions[key] = self.decisions.get(key, 0) + 1
        self.believed.add((decision.prefill or chosen).cached_tokens)

    def checked(self, equal: bool) -> None:
        """Count a look-up that was compared with the slow one."""
        self.checks[equal] += 1

    def end(self) -> None:
        """The router has ended."""
        if self.core is not None:
            self.dropped += self.core.index.dropped
            self.core = None


class RouteCounts:
    """The counts of all models, as a collector for `connection.metrics.add`."""

    def __init__(self) -> None:
        self._models: dict[str, ModelCounts] = {}

    def of_model(self, name: str, core: Router) -> ModelCounts:
        """The counts of a model, whose router is `core` from now on."""
        found = self._models.setdefault(name, ModelCounts())
        found.end()
        found.core = core
        return found

    def collect(self) -> Iterable[Metric]:
        """The metrics with their present values. Another thread than the loop's calls this."""
        made = importlib.import_module("prometheus_client.core")
        counter, gauge, histogram = made.CounterMetricFamily, made.GaugeMetricFamily, made.HistogramMetricFamily
        models = self._models.copy()
        text = "Requests that a chosen worker has begun to answer."
        family = counter("triton_llm_route_decisions", text, labels=("model", "policy", "mode"))
        for name, counts in models.items():
            for (policy, mode), count in counts.decisions.copy().items():
                family.add_metric((name, policy, mode), count)
        yield family
        text = "Tokens of a prompt in the chosen worker's cache: as the router believed, and as the engine measured."
        family = histogram("triton_llm_route_cached_tokens", text, labels=("model", "kind"))
        for name, counts in models.items():
            for kind, values in (("believed", counts.believed), ("measured", counts.measured)):
                family.add_metric((name, kind), *values.buckets())
        yield family
        family = histogram(
            "triton_llm_route_held_seconds", "How long the router held a request, if it did.", labels=("model",)
        )
        for name, counts in models.items():
            family.add_metric((name,), *counts.held.buckets())
        yield family
        text = "Prompts for prefill workers: handed over to the answer's worker, or failed and computed there."
        family = counter("triton_llm_route_prefills", text, labels=("model", "result"))
        for name, counts in models.items():
            for result, count in counts.prefills.items():
                family.add_metric((name, result), count)
        yield family
        text = "Look-ups in the index that were compared with a slow and sure one, by the result."
        family = counter("triton_llm_route_index_checks", text, labels=("model", "result"))
        for name, counts in models.items():
            for result, count in zip(("different", "equal"), counts.checks, strict=True):
                family.add_metric((name, result), count)
        yield family
        text = "Blocks that were not stored because the index was full."
        family = counter("triton_llm_route_index_dropped", text, labels=("model",))
        for name, counts in models.items():
            core = counts.core
            family.add_metric((name,), counts.dropped + (0 if core is None else core.index.dropped))
        yield family
        present = {name: core for name, counts in models.items() if (core := counts.core) is not None}
        family = gauge("triton_llm_route_index_blocks", "Blocks in the index.", labels=("model",))
        for name, core in present.items():
            family.add_metric((name,), len(core.index))
        yield family
        family = gauge("triton_llm_route_held", "Requests that the router holds now.", labels=("model",))
        for name, core in present.items():
            family.add_metric((name,), core.held)
        yield family
        text = "Workers by how their cache is known."
        family = gauge("triton_llm_route_workers", text, labels=("model", "mode"))
        for name, core in present.items():
            modes = [each.mode for each in core.workers.copy().values()]
            for mode in MODES:
                family.add_metric((name, mode), modes.count(mode))
        yield family
        text = "Workers whose engine should report its cache, and has not."
        family = gauge("triton_llm_route_silent_workers", text, labels=("model",))
        for name, core in present.items():
            family.add_metric((name,), sum(each.silent for each in core.workers.copy().values()))
        yield family


_of: WeakKeyDictionary[Connection, RouteCounts] = WeakKeyDictionary()


def counts_of(connection: Connection) -> RouteCounts:
    """The counts of a connection, which are on the connection's page from the first use on."""
    found = _of.get(connection)
    if found is None:
        found = _of[connection] = RouteCounts()
        connection.metrics.add(found)
    return found
