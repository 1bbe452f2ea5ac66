"""Chaos runs: a seeded schedule of faults for your own worker processes, and a check of what they leave behind."""

from triton_distributed.testing.chaos.cluster import ChaosCluster
from triton_distributed.testing.chaos.control import obey
from triton_distributed.testing.chaos.disk import private_mounts
from triton_distributed.testing.chaos.report import Report
from triton_distributed.testing.chaos.schedule import LASTING, Fault, FaultKind, Recovery, schedule

__all__ = [
    "LASTING",
    "ChaosCluster",
    "Fault",
    "FaultKind",
    "Recovery",
    "Report",
    "obey",
    "private_mounts",
    "schedule",
]
