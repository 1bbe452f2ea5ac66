"""What the runtime tells about itself: plain numbers, free to count and read by whoever listens."""

from triton_distributed.observe.stats import Outcome, OutlierStats, Stats
from triton_distributed.observe.watchdog import LAG_BOUNDS_S, LoopStats, Watchdog

__all__ = ["LAG_BOUNDS_S", "LoopStats", "Outcome", "OutlierStats", "Stats", "Watchdog"]
