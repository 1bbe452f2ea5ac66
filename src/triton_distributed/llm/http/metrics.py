"""The metrics of the front end, for Prometheus. docs/llm/front-end.md lists them."""

from __future__ import annotations

from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_LONG = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class Ended(NamedTuple):
    """What a request with certain labels adds to when it ends."""

    requests: Counter
    seconds: Histogram
    prompt: Counter
    cached: Counter
    completion: Counter


class Timed(NamedTuple):
    """What the tokens of a model's answers add to."""

    first_token: Histogram
    between_tokens: Histogram


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
        # The library looks up labels in 3 µs, under a lock. The labels are few: see `Access`.
        self._ended: dict[tuple[str, str, int], Ended] = {}
        self._timed: dict[str, Timed] = {}

    def ended(self, route: str, model: str, status: int) -> Ended:
        """The series of a request's labels."""
        found = self._ended.get((route, model, status))
        if found is None:
            kinds = (self.tokens.labels(model, kind) for kind in ("prompt", "cached", "completion"))
            found = Ended(self.requests.labels(route, model, status), self.seconds.labels(route, model), *kinds)
            self._ended[route, model, status] = found
        return found

    def timed(self, model: str) -> Timed:
        """The series of a model's tokens."""
        found = self._timed.get(model)
        if found is None:
            found = self._timed[model] = Timed(self.first_token.labels(model), self.between_tokens.labels(model))
        return found
