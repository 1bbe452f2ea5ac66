"""`trd doctor` names variables of OpenTelemetry that have no effect."""

from __future__ import annotations

import pytest

from triton_distributed.cli.checks import traces
from triton_distributed.config import Config

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"}


@pytest.mark.parametrize(
    "environ",
    [{}, {"OTEL_TRACES_EXPORTER": "none"}, {**ENDPOINT, "OTEL_SDK_DISABLED": "true"}],
    ids=["not asked", "none", "disabled"],
)
def test_nothing_is_said_if_no_spans_are_wanted(environ: dict[str, str]) -> None:
    assert traces.traces(Config(), environ) == []


def test_spans_that_no_process_would_make(monkeypatch: pytest.MonkeyPatch) -> None:
    (off,) = traces.traces(Config(traces=False), ENDPOINT)
    assert (off.level, off.advice) == ("warning", "unset TRD_TRACES")
    monkeypatch.setattr(traces, "find_spec", lambda name: None)
    (missing,) = traces.traces(Config(), ENDPOINT)
    assert missing.level == "warning"
    assert missing.text.startswith("OTEL_EXPORTER_OTLP_ENDPOINT is set, but OpenTelemetry's SDK is not installed")
    assert missing.advice == "pip install triton-distributed[otel]"


def test_what_makes_the_spans_is_named() -> None:
    (by_program,) = traces.traces(Config(), {"OTEL_TRACES_EXPORTER": "console"})
    (by_command,) = traces.traces(
        Config(), {**ENDPOINT, "PYTHONPATH": "/x/opentelemetry/instrumentation/auto_instrumentation"}
    )
    assert [by_program.level, by_command.level] == ["ok", "ok"]
    assert "opentelemetry-instrument" in by_program.text
    assert by_command.text == "opentelemetry-instrument configures the SDK"
