"""The Grafana dashboard: its queries are PromQL that reads metrics which exist, and its panels do not overlap."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.files import DEPLOY, KUBERNETES, manifest
from tests.deploy.metrics import NAME, SUFFIXES, documented, unknown
from tests.deploy.test_alerts import needs_promtool, promtool

DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
QUERIES = [target["expr"] for each in PANELS for target in each.get("targets", ())]
ADAPTER = yaml.safe_load((KUBERNETES / "adapter-values.yaml").read_text(encoding="utf-8"))["rules"]["custom"][0]
SHOWN = (
    *("requests_total", "request_duration", "first_item", "request_queue", "in_flight", "requests_queued"),
    *("calls_total", "call_duration", "loop_lag", "loop_stalled", "discovery_up", "discovery_age", "sessions"),
    *("loop_wait", "nats_connected", "endpoint_serving", "replica_up", "replica_restarts"),
    *("llm_http_requests", "time_to_first_token", "time_between_tokens", "llm_http_tokens", "llm_requests_waiting"),
)


def filled(expression: str) -> str:
    """A query with Grafana's or the adapter's variables replaced."""
    values = {"$__rate_interval": "5m", "$job": ".*", "$endpoint": ".*", "<<.GroupBy>>": "namespace, pod"}
    values["<<.LabelMatchers>>"] = 'namespace="n",pod=~"worker-1|worker-2"'
    for name, value in values.items():
        expression = expression.replace(name, value)
    return expression


def scaling() -> list[str]:
    """The queries by which the workers are scaled."""
    keda = manifest("ScaledObject", "worker")["spec"]["triggers"][0]["metadata"]["query"]
    return [filled(ADAPTER["metricsQuery"]), keda]


def test_queries_read_metrics_that_exist_with_their_labels() -> None:
    assert [each for query in [*QUERIES, *scaling(), ADAPTER["seriesQuery"]] for each in unknown(filled(query))] == []
    variables = json.dumps(DASHBOARD["templating"])
    assert {SUFFIXES.sub("", each) for each in NAME.findall(variables)} <= set(documented())
    assert [each for each in SHOWN if not any(each in query for query in QUERIES)] == []


def test_panels_have_ids_places_and_a_source() -> None:
    assert len({each["id"] for each in PANELS}) == len(PANELS)
    for one, other in combinations([each["gridPos"] for each in PANELS], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    for each in PANELS:
        assert each["gridPos"]["x"] + each["gridPos"]["w"] <= 24
        assert each["type"] == "row" or (each["datasource"]["uid"], bool(each["targets"])) == ("${source}", True)
    assert [each["name"] for each in DASHBOARD["templating"]["list"]] == ["source", "job", "endpoint"]


@needs_promtool
def test_queries_are_promql(tmp_path: Path) -> None:
    rules = [{"record": f"query:{number}", "expr": filled(each)} for number, each in enumerate([*QUERIES, *scaling()])]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}), encoding="utf-8")
    promtool("check", "rules", file)


@needs_promtool
def test_workers_are_scaled_by_what_runs_and_what_waits(tmp_path: Path) -> None:
    series = {
        'triton_requests_in_flight{namespace="n",pod="worker-1",endpoint="a"}': "20",
        'triton_requests_in_flight{namespace="n",pod="worker-1",endpoint="b"}': "1",
        'triton_requests_queued{namespace="n",pod="worker-1",endpoint="a"}': "7",
        'triton_requests_in_flight{namespace="n",pod="worker-2",endpoint="a"}': "3",
        'triton_requests_queued{namespace="n",pod="worker-2",endpoint="a"}': "0",
        'triton_requests_queued{namespace="n",pod="gateway-1",endpoint="a"}': "99",
    }
    adapter, keda = scaling()
    pods = [("worker-1", 28), ("worker-2", 3)]
    expected = [
        {"expr": adapter, "exp_samples": [{"labels": f'{{namespace="n",pod="{pod}"}}', "value": n} for pod, n in pods]},
        {"expr": keda.replace('"triton-distributed"', '"n"'), "exp_samples": [{"labels": "{}", "value": 31}]},
    ]
    inputs = [{"series": name, "values": value} for name, value in series.items()]
    test = {
        "interval": "1m",
        "input_series": inputs,
        "promql_expr_test": [{**each, "eval_time": "0m"} for each in expected],
    }
    file = tmp_path / "scaling.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [], "tests": [test]}), encoding="utf-8")
    promtool("test", "rules", file)
