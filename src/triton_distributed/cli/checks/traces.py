"""Checks of traces: whether the variables of OpenTelemetry ask for spans that no process would make."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from triton_distributed.cli.checks.finding import Finding, ok, warning
from triton_distributed.config import Config, variable

PART = "traces"
ASKING = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER")
"""The variables that say where spans go."""


def traces(config: Config, environ: Mapping[str, str] | None = None) -> list[Finding]:
    """Check whether spans are wanted, and can be made.

    Args:
        config: the settings.
        environ: the variables to check instead of those of the process.
    """

    def value(name: str) -> str:
        return variable(name) if environ is None else environ.get(name, "")

    asked = next((name for name in ASKING if value(name) not in ("", "none")), None)
    if asked is None or value("OTEL_SDK_DISABLED").lower() == "true":
        return []
    if not config.traces:
        return [warning(PART, f"{asked} is set, but TRD_TRACES is off: there are no spans", "unset TRD_TRACES")]
    if not _is_installed():
        words = f"{asked} is set, but OpenTelemetry's SDK is not installed: there are no spans"
        return [warning(PART, words, "pip install triton-distributed[otel]")]
    if "auto_instrumentation" in value("PYTHONPATH"):  # `opentelemetry-instrument` has set it.
        return [ok(PART, "opentelemetry-instrument configures the SDK")]
    words = (
        f"{asked} is set: there are spans if the program configures the SDK, or runs under `opentelemetry-instrument`"
    )
    return [ok(PART, words)]


def _is_installed() -> bool:
    try:
        return find_spec("opentelemetry.sdk") is not None
    except ImportError:
        return False
