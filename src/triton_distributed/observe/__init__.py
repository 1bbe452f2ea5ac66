"""What the runtime tells about itself: plain numbers, free to count and read by whoever listens."""

from triton_distributed.observe.stats import Outcome, Stats

__all__ = ["Outcome", "Stats"]
