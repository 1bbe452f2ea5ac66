"""The metrics of the front end, for Prometheus. docs/llm/front-end.md lists them.

They are plain numbers that the event loop counts. A request changes about ten, and a counter of prometheus-client takes
a lock each time, which would cost 8 µs a request.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from math import inf

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from triton_distributed.llm.contract.output import Usage

_SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, inf)
_LONG = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, inf)


class Durations:
    """Counts durations by their length.

    Args:
        bounds_s: the upper bounds of the buckets in seconds, each inclusive; the last one is infinite.
    """

    __slots__ = ("_bounds_s", "_counts", "_total_s")

    def __init__(self, bounds_s: tuple[float, ...]) -> None:
        self._bounds_s, self._counts, self._total_s = bounds_s, [0] * len(bounds_s), 0.0

    def add(self, seconds: float) -> None:
        """Count one. It is called often."""
        self._counts[bisect_left(self._bounds_s, seconds)] += 1
        self._total_s += seconds

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """The durations up to each bound, and the sum of all in seconds."""
        found, upto = [], 0
        for bound, count in zip(self._bounds_s, self._counts, strict=True):
            upto += count
            found.append(("+Inf" if bound == inf else str(bound), float(upto)))
        return found, self._total_s


class FrontMetrics:
    """The counters and histograms, as a collector for `connection.metrics.add`.

    Attributes:
        in_flight: requests that run now.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self._requests: dict[tuple[str, str, str], int] = {}
        self._seconds: dict[tuple[str, str], Durations] = {}
        self._tokens: dict[str, tuple[int, int, int]] = {}
        self._first: dict[tuple[str], Durations] = {}
        self._between: dict[tuple[str], Durations] = {}

    def ended(self, route: str, model: str, status: int, seconds: float, usage: Usage | None) -> None:
        """Count a request that has ended.

        Args:
            route, model, status: its labels. They are few: see `Access`.
            seconds: from the request to the end of its answer.
            usage: its tokens, if its answer is complete.
        """
        labels = route, model, str(status)
        self._requests[labels] = self._requests.get(labels, 0) + 1
        durations = self._seconds.get((route, model))
        if durations is None:
            durations = self._seconds[route, model] = Durations(_LONG)
        durations.add(seconds)
        if usage is not None:
            prompt, cached, completion = self._tokens.get(model, (0, 0, 0))
            self._tokens[model] = (
                prompt + usage.prompt_tokens,
                cached + usage.cached_tokens,
                completion + usage.completion_tokens,
            )

    def timed(self, model: str) -> tuple[Durations, Durations]:
        """The times to the first token of a model's answers, and those between two arrivals of tokens."""
        labels = (model,)
        if labels not in self._first:
            self._first[labels], self._between[labels] = Durations(_LONG), Durations(_SHORT)
        return self._first[labels], self._between[labels]

    def collect(self) -> Iterable[Metric]:
        """The metrics with their present values. Another thread than the loop's calls this."""
        labels = ["route", "model", "status"]
        requests = CounterMetricFamily("triton_llm_http_requests", "Requests that have ended.", labels=labels)
        for values, count in self._requests.copy().items():
            requests.add_metric(values, count)
        yield requests
        yield GaugeMetricFamily("triton_llm_http_in_flight", "Requests that run now.", value=self.in_flight)
        for name, text, series, names in (
            ("request", "From the request to the end of its answer.", self._seconds, labels[:2]),
            ("time_to_first_token", "From the request to the first token.", self._first, ["model"]),
            ("time_between_tokens", "Between two arrivals of tokens of one request.", self._between, ["model"]),
        ):
            histogram = HistogramMetricFamily(f"triton_llm_http_{name}_seconds", text, labels=names)
            for each, durations in series.copy().items():
                histogram.add_metric(each, *durations.buckets())
            yield histogram
        text = "Tokens of requests that have ended: of prompts (of these, cached ones) and of answers."
        tokens = CounterMetricFamily("triton_llm_http_tokens", text, labels=["model", "kind"])
        for model, counts in self._tokens.copy().items():
            for kind, tokens_of in zip(("prompt", "cached", "completion"), counts, strict=True):
                tokens.add_metric((model, kind), tokens_of)
        yield tokens
