"""For the tests of programs: a network that misbehaves, and what every discovery backend must do."""

from triton_distributed.testing.discovery import ChangeLog, DiscoveryConformance
from triton_distributed.testing.proxy import FaultProxy, Faults

__all__ = ["ChangeLog", "DiscoveryConformance", "FaultProxy", "Faults"]
