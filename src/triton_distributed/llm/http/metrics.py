"""The metrics of the front end, for Prometheus. docs/llm/front-end.md lists them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_LONG = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class FrontMetrics:
    """The counters and histograms, in a registry of their own.

    Attributes:
        registry: for `connection.metrics.add`.
    """

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter(
            "triton_llm_http_requests", "Requests that have ended.", ["route", "model", "status"], registry=own
        )
        self.in_flight = Gauge("triton_llm_http_in_flight", "Requests that run now.", registry=own)
        self.seconds = Histogram(
            "triton_llm_http_request_seconds",
            "From the request to the end of its answer.",
            ["route", "model"],
            registry=own,
            buckets=_LONG,
        )
        self.first_token = Histogram(
            "triton_llm_http_time_to_first_token_seconds",
            "From the request to the first token.",
            ["model"],
            registry=own,
            buckets=_LONG,
        )
        self.between_tokens = Histogram(
            "triton_llm_http_time_between_tokens_seconds",
            "Between two arrivals of tokens of one request.",
            ["model"],
            registry=own,
            buckets=_SHORT,
        )
        self.tokens = Counter(
            "triton_llm_http_tokens",
            "Tokens of requests that have ended: of prompts (of these, cached ones) and of answers.",
            ["model", "kind"],
            registry=own,
        )
