"""The metrics of front ends and engines are those of their pages, with labels and texts."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Metric

import triton_distributed as trd
from tests.guards.tree import ROOT
from triton_distributed.llm.contract.engine import Engine, EngineMetrics
from triton_distributed.llm.contract.output import Usage
from triton_distributed.llm.http.metrics import FrontMetrics
from triton_distributed.llm.models.route_counts import RouteCounts
from triton_distributed.llm.routing.router import Router
from triton_distributed.llm.routing.view import Question
from triton_distributed.llm.worker.metrics import collector_of
from triton_distributed.llm.worker.watch import Watching
from triton_distributed.names import EndpointName, Instance

Row = tuple[str, tuple[str, ...], str]
"""Kind, labels in the order of their names, and text."""


def documented(page: str) -> dict[str, Row]:
    found = {}
    for line in (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("| `triton_llm_"):
            name, kind, labels, text = (each.strip() for each in line.split("|")[1:5])
            found[name.strip("`")] = kind, tuple(sorted(filter(None, labels.split(", ")))), text
    return found


def shown(families: Iterable[Metric]) -> dict[str, Row]:
    found = {}
    for each in families:
        labels = {label for sample in each.samples for label in sample.labels} - {"le"}
        name = each.name + "_total" * (each.type == "counter")
        text = each.documentation[0].lower() + each.documentation[1:].removesuffix(".")
        found[name] = each.type, tuple(sorted(labels)), text
    return found


def test_the_metrics_of_the_front_end_are_those_of_its_page():
    metrics = FrontMetrics()
    metrics.ended("/v1/models", "m", 200, 0.1, Usage())
    metrics.timed("m")
    assert shown(metrics.collect()) == documented("llm/front-end.md")


def test_the_metrics_of_routing_are_those_of_its_page():
    counts, core = RouteCounts(), Router.named("kv")
    core.add((1, 0), Instance(EndpointName("models", "m", "generate"), 1, ("x",)))
    model = counts.of_model("m", core)
    decision = core.weigh(Question(tokens=1), 0.0)
    assert decision is not None
    model.chosen(decision)
    assert shown(counts.collect()) == documented("llm/routing.md")


async def test_the_metrics_of_an_engine_are_those_of_the_page():
    class Busy(Engine):
        def metrics(self) -> EngineMetrics:
            return EngineMetrics(active=1)

    async with trd.connect(trd.Config(discovery="memory", handle_signals=False)) as here:
        collector = collector_of(here)
        engine = Busy()
        collector.add(engine, "m", Watching(engine))
        assert shown(collector.collect()) == documented("metrics.md")
