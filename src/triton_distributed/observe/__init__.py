"""The runtime's measurements of itself: plain numbers, cheap to count and free to read."""

from triton_distributed.observe.stats import Outcome, OutlierStats, Stats
from triton_distributed.observe.watchdog import LAG_BOUNDS_S, LoopStats, Watchdog

__all__ = ["LAG_BOUNDS_S", "LoopStats", "Outcome", "OutlierStats", "Stats", "Watchdog"]
