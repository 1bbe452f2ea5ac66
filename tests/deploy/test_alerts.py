"""The alert rules: Prometheus' own tool fires each of them, and lets none fire for a healthy system."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.files import DEPLOY
from tests.deploy.metrics import unknown, used
from tests.guards.tree import ROOT
from triton_distributed.config import Config

RULES = DEPLOY / "grafana" / "alerts.yaml"
ALERTS = {each["alert"]: each for each in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"][0]["rules"]}
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool here (Debian: apt-get install prometheus)")

WORKER = 'job="triton",instance="w:9400"'
ENDPOINT = 'job="triton",endpoint="a.b.c"'
JOB, NAMED = {"job": "triton"}, {"job": "triton", "endpoint": "a.b.c"}
AT = {"job": "triton", "instance": "w:9400"}
C = "a.b.c"

# For each alert: series that fire it within 30 minutes (one sample a minute), the labels, and the text.
FIRING: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    "TritonProcessDown": (
        {f"up{{{WORKER}}}": "1x10 0x30", f"triton_runtime_info{{{WORKER}}}": "1x10"},
        AT,
        "w:9400 does not answer on its status port",
    ),
    "TritonNothingScraped": ({}, {}, "Prometheus reads no status port"),
    "TritonNoInstance": (
        {
            f'triton_instances{{{ENDPOINT},instance="c1",state="candidate"}}': "3x10 0x30",
            f'triton_instances{{{ENDPOINT},instance="c2",state="candidate"}}': "3x15 0x30",
            f'triton_instances{{{ENDPOINT},instance="c1",state="ejected"}}': "0x40",
        },
        NAMED,
        f"No client has an instance of {C} that it can call",
    ),
    "TritonRestarts": (
        {
            f"process_start_time_seconds{{{WORKER}}}": "0x15 1000x4 2000x4 3000x10",
            f"triton_runtime_info{{{WORKER}}}": "1x25 _x15",  # it is down just now
        },
        AT,
        "w:9400 has started again 3 times in 15 minutes",
    ),
    "TritonReplicaDown": (
        {
            f'triton_replica_up{{{WORKER},replica="1"}}': "1x10 0x30",
            f'triton_replica_up{{{WORKER},replica="0"}}': "1x40",
        },
        {**AT, "replica": "1"},
        "Replica 1 of w:9400 does not answer",
    ),
    "TritonNotServing": (
        {
            f"triton_endpoint_serving{{{ENDPOINT},{WORKER[13:]}}}": "1x10 0x30",
            f"triton_draining{{{WORKER}}}": "0x40",
        },
        {**NAMED, **AT},
        f"w:9400 runs and does not serve {C}",
    ),
    "TritonHandlerErrors": (
        {
            f'triton_requests_total{{{ENDPOINT},outcome="ok"}}': "0+90x40",
            f'triton_requests_total{{{ENDPOINT},outcome="error"}}': "0+10x40",
        },
        NAMED,
        f"The handler of {C} fails in 10% of its requests",
    ),
    "TritonCallsFail": (
        {
            f'triton_calls_total{{{ENDPOINT},outcome="ok"}}': "0+95x40",
            f'triton_calls_total{{{ENDPOINT},outcome="lost"}}': "0+2x40",
            f'triton_calls_total{{{ENDPOINT},outcome="unreachable"}}': "0+3x40",
        },
        NAMED,
        f"5% of the calls to {C} fail after all retries",
    ),
    "TritonOverloaded": (
        {
            f'triton_requests_total{{{ENDPOINT},outcome="ok"}}': "0+80x40",
            f'triton_requests_total{{{ENDPOINT},outcome="refused"}}': "0+20x40",
        },
        NAMED,
        f"The workers of {C} refuse 20% of their requests",
    ),
    "TritonQueueSlow": (
        {
            f'triton_request_queue_seconds_bucket{{{ENDPOINT},le="1"}}': "0x40",
            f'triton_request_queue_seconds_bucket{{{ENDPOINT},le="2"}}': "0+100x40",
            f'triton_request_queue_seconds_bucket{{{ENDPOINT},le="+Inf"}}': "0+100x40",
        },
        NAMED,
        f"1 % of the requests of {C} wait 1.99s or longer to begin",
    ),
    "TritonRetries": (
        {
            f"triton_call_retries_total{{{ENDPOINT}}}": "0+20x40",
            f'triton_calls_total{{{ENDPOINT},outcome="ok"}}': "0+100x40",
        },
        NAMED,
        f"20% of the calls to {C} are sent again",
    ),
    "TritonEjections": (
        {f"triton_ejections_total{{{ENDPOINT}}}": "0+1x40"},
        NAMED,
        f"Clients leave out instances of {C} that fail more often than the others",
    ),
    "TritonLoopStuck": (
        {f"triton_loop_stuck_seconds{{{WORKER}}}": "0x29 45x10"},
        AT,
        "The event loop of w:9400 has been stuck for 45s",
    ),
    "TritonLoopStalled": (
        {f"triton_loop_stalled_seconds_total{{{WORKER}}}": "0+6x40"},
        AT,
        "The event loop of w:9400 is stuck for 10% of the time",
    ),
    "TritonLoopLag": (
        {
            f'triton_loop_lag_seconds_bucket{{{WORKER},le="0.1"}}': "0x40",
            f'triton_loop_lag_seconds_bucket{{{WORKER},le="0.2"}}': "0+100x40",
            f'triton_loop_lag_seconds_bucket{{{WORKER},le="+Inf"}}': "0+100x40",
        },
        AT,
        "1 % of the timers of w:9400 are 199ms late or later",
    ),
    "TritonDiscoveryDown": (
        {f'triton_discovery_up{{{WORKER},backend="etcd"}}': "1x10 0x30"},
        {**AT, "backend": "etcd"},
        "w:9400 cannot reach its discovery (etcd)",
    ),
    "TritonNatsDown": (
        {f"triton_nats_connected{{{WORKER}}}": "1x10 0x30"},
        AT,
        "w:9400 is not connected to NATS",
    ),
    "TritonCertificateEnds": (
        {f'triton_certificate_end_timestamp_seconds{{{WORKER},setting="TRD_TLS_CERT"}}': f"{30 * 60 + 3 * 86400}x40"},
        {**AT, "setting": "TRD_TLS_CERT"},
        "A certificate in TRD_TLS_CERT of w:9400 ends in 3d 0h 0m 0s",
    ),
    "TritonMemoryHeld": (
        {f"triton_held_bytes{{{WORKER}}}": "900x40", f"triton_held_limit_bytes{{{WORKER}}}": "1000x40"},
        AT,
        "w:9400 holds 90% of what TRD_MAX_HELD_BYTES allows",
    ),
    "TritonFewFilesLeft": (
        {
            f"process_open_fds{{{WORKER}}}": "950x40",
            f"process_max_fds{{{WORKER}}}": "1000x40",
            f"triton_runtime_info{{{WORKER}}}": "1x40",
        },
        AT,
        "w:9400 has opened 95% of the files that it may",
    ),
}

# A busy system with the faults that a day brings: a restart, a few refusals and retries, a short stall.
HEALTHY = {
    f"up{{{WORKER}}}": "1x40",
    f"triton_runtime_info{{{WORKER}}}": "1x40",
    f'triton_instances{{{ENDPOINT},instance="c1",state="candidate"}}': "3x10 0x5 3x30",
    f'triton_instances{{{ENDPOINT},instance="c2",state="candidate"}}': "3x40",
    f"process_start_time_seconds{{{WORKER}}}": "0x20 1000x20",
    f'triton_requests_total{{{ENDPOINT},outcome="ok"}}': "0+1000x40",
    f'triton_requests_total{{{ENDPOINT},outcome="error"}}': "0+1x40",
    f'triton_requests_total{{{ENDPOINT},outcome="cancelled"}}': "0+300x40",
    f'triton_requests_total{{{ENDPOINT},outcome="refused"}}': "0+10x40",
    f'triton_calls_total{{{ENDPOINT},outcome="ok"}}': "0+1000x40",
    f'triton_calls_total{{{ENDPOINT},outcome="deadline"}}': "0+1x40",
    f'triton_request_queue_seconds_bucket{{{ENDPOINT},le="0.1"}}': "0+1000x40",
    f'triton_request_queue_seconds_bucket{{{ENDPOINT},le="+Inf"}}': "0+1001x40",
    f"triton_call_retries_total{{{ENDPOINT}}}": "0+10x40",
    f"triton_ejections_total{{{ENDPOINT}}}": "0x20 1x20",
    f"triton_loop_stalled_seconds_total{{{WORKER}}}": "0x20 3x20",
    f'triton_loop_lag_seconds_bucket{{{WORKER},le="0.01"}}': "0+1000x40",
    f'triton_loop_lag_seconds_bucket{{{WORKER},le="+Inf"}}': "0+1001x40",
    f"triton_loop_stuck_seconds{{{WORKER}}}": "0x19 3 0x20",
    f'triton_discovery_up{{{WORKER},backend="etcd"}}': "1x40",
    f"triton_nats_connected{{{WORKER}}}": "1x10 0 1x29",
    'triton_endpoint_serving{job="triton",instance="drains",endpoint="a.b.c"}': "1x10 0x30",
    'triton_draining{job="triton",instance="drains"}': "0x10 1x30",
    # Replicas: one process has failed, others were replaced as planned, and one loads a model for nine minutes.
    'triton_runtime_info{job="triton",instance="supervisor",replica="0"}': "1x40",
    'triton_replica_restarts_total{job="triton",instance="supervisor",replica="0"}': "0x20 1x4 2x16",
    'process_start_time_seconds{job="triton",instance="supervisor",replica="0"}': "0x10 1x4 2x4 3x4 4x4 5x14",
    'triton_replica_up{job="triton",instance="supervisor",replica="0"}': "1x10 0x8 1x22",
    f'triton_certificate_end_timestamp_seconds{{{WORKER},setting="TRD_TLS_CERT"}}': f"{60 * 86400}x40",
    f"triton_held_bytes{{{WORKER}}}": "100x40",
    f"triton_held_limit_bytes{{{WORKER}}}": "1000x40",
    f"process_open_fds{{{WORKER}}}": "100x40",
    f"process_max_fds{{{WORKER}}}": "1000x40",
    # Other programs, which these rules leave alone.
    'up{job="other",instance="o"}': "0x40",
    'process_start_time_seconds{job="other",instance="o"}': "0x20 1x4 2x4 3x4 4x8",
    'process_open_fds{job="other",instance="o"}': "990x40",
    'process_max_fds{job="other",instance="o"}': "1000x40",
}


def promtool(*arguments: object) -> str:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def inputs(series: dict[str, str]) -> list[dict[str, str]]:
    return [{"series": name, "values": values} for name, values in series.items()]


def firing(name: str) -> dict[str, Any]:
    series, labels, summary = FIRING[name]
    rule = ALERTS[name]
    expected = {
        "exp_labels": {**labels, **rule["labels"]},
        "exp_annotations": {"summary": summary, "runbook": rule["annotations"]["runbook"]},
    }
    tests = [{"eval_time": "30m", "alertname": name, "exp_alerts": [expected]}]
    return {"interval": "1m", "input_series": inputs(series), "alert_rule_test": tests}


@needs_promtool
def test_each_alert_fires_and_none_without_a_reason(tmp_path: Path) -> None:
    quiet = [
        {"eval_time": f"{minute}m", "alertname": name, "exp_alerts": []}
        for name in ALERTS
        for minute in range(6, 36, 3)
    ]
    healthy = {"interval": "1m", "input_series": inputs(HEALTHY), "alert_rule_test": quiet}
    promtool("check", "rules", RULES)
    check(tmp_path, *map(firing, ALERTS), healthy)


def check(tmp_path: Path, *tests: dict[str, Any]) -> None:
    """Run tests of the rules, with an evaluation a minute."""
    file = tmp_path / "tests.yaml"
    suite = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": list(tests)}
    file.write_text(yaml.safe_dump(suite, sort_keys=False), encoding="utf-8")
    promtool("test", "rules", file)


@needs_promtool
def test_a_replica_that_fails_again_and_again_is_a_restart_too(tmp_path: Path) -> None:
    case = firing("TritonRestarts")
    case["input_series"] = inputs({f'triton_replica_restarts_total{{{WORKER},replica="1"}}': "0x15 1x4 2x4 3x4 4x8"})
    ((expected,),) = [each["exp_alerts"] for each in case["alert_rule_test"]]
    expected["exp_labels"]["replica"] = "1"
    check(tmp_path, case)


@needs_promtool
def test_a_process_stays_down_until_it_is_back_or_is_no_target(tmp_path: Path) -> None:
    case = firing("TritonProcessDown")
    series = {f"up{{{WORKER}}}": "1x10 0x190 1x20 0x20 _x20", f"triton_runtime_info{{{WORKER}}}": "1x10 _x190 1x20"}
    case["input_series"] = inputs(series)
    (down,) = case["alert_rule_test"]
    times = {11: [], 12: down["exp_alerts"], 180: down["exp_alerts"], 210: [], 235: down["exp_alerts"], 250: []}
    case["alert_rule_test"] = [{**down, "eval_time": f"{at}m", "exp_alerts": found} for at, found in times.items()]
    check(tmp_path, case)


@needs_promtool
def test_a_stuck_loop_is_known_before_its_process_is_ended_and_for_some_time_after(tmp_path: Path) -> None:
    ended_s = int(Config().live_timeout_s)
    stuck = " ".join(str(each) for each in range(15, ended_s + 1, 15))  # from minute 10 on
    case = firing("TritonLoopStuck")
    (found,) = case["alert_rule_test"]
    (expected,) = found["exp_alerts"]
    tests = [{**found, "eval_time": f"{minute}m", "exp_alerts": []} for minute in (10, 18)]
    for minute, text in ((11, "1m 0s"), (12, "2m 0s"), (16, "2m 0s")):
        words = {"summary": f"The event loop of w:9400 has been stuck for {text}"}
        alert = {**expected, "exp_annotations": {**expected["exp_annotations"], **words}}
        tests.append({**found, "eval_time": f"{minute}m", "exp_alerts": [alert]})
    series = {f"triton_loop_stuck_seconds{{{WORKER}}}": f"0x40 {stuck} stale"}
    assert ended_s == 120
    check(tmp_path, {"interval": "15s", "input_series": inputs(series), "alert_rule_test": tests})


@pytest.mark.parametrize("name", ALERTS)
def test_no_alert_asks_for_the_name_of_a_job(name: str) -> None:
    assert not re.search(r"\b(job|instance|namespace|pod)\s*(=|!)", ALERTS[name]["expr"])


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_reads_metrics_that_exist_and_leads_to_its_runbook(name: str) -> None:
    rule = ALERTS[name]
    assert unknown(rule["expr"]) == []
    assert used(rule["expr"]) or "process_" in rule["expr"] or rule["expr"].startswith("up{")
    assert rule["labels"]["severity"] in ("critical", "warning")
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^## (.+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert anchor in [re.sub(r"[^a-z0-9]+", "-", each.lower()).strip("-") for each in headings]


def test_each_alert_has_a_case_and_a_line_for_operators() -> None:
    assert set(ALERTS) == set(FIRING)
    page = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `(Triton\w+)` \| (\w+) \|.*\(runbooks\.md(#[\w-]+)\) \|$", page, re.MULTILINE)
    rules = [(name, rule["labels"]["severity"], rule["annotations"]["runbook"]) for name, rule in ALERTS.items()]
    assert [(name, severity, f"docs/runbooks.md{anchor}") for name, severity, anchor in lines] == rules
