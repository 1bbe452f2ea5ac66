"""The runtime's measurements of itself: plain numbers, cheap to count and free to read."""

from triton_distributed.observe.histogram import BOUNDS_S, Histogram, quantile
from triton_distributed.observe.stats import CallStats, Outcome, OutlierStats, RequestStats, Stats
from triton_distributed.observe.watchdog import LAG_BOUNDS_S, LoopStats, Watchdog

__all__ = [
    "BOUNDS_S",
    "LAG_BOUNDS_S",
    "CallStats",
    "Histogram",
    "LoopStats",
    "Outcome",
    "OutlierStats",
    "RequestStats",
    "Stats",
    "Watchdog",
    "quantile",
]
