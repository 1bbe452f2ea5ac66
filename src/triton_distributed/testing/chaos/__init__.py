"""Chaos runs: a seeded schedule of faults against workers under load, and an oracle that judges every request."""

from triton_distributed.testing.chaos.cluster import ChaosCluster
from triton_distributed.testing.chaos.control import obey
from triton_distributed.testing.chaos.disk import private_mounts
from triton_distributed.testing.chaos.oracle import Oracle, Ticket
from triton_distributed.testing.chaos.real import judged
from triton_distributed.testing.chaos.report import Report
from triton_distributed.testing.chaos.requests import Journal, Plan, Shape, Variety, Work, echo, handler, plans
from triton_distributed.testing.chaos.schedule import LASTING, Fault, FaultKind, Recovery, schedule, spared

__all__ = [
    "LASTING",
    "ChaosCluster",
    "Fault",
    "FaultKind",
    "Journal",
    "Oracle",
    "Plan",
    "Recovery",
    "Report",
    "Shape",
    "Ticket",
    "Variety",
    "Work",
    "echo",
    "handler",
    "judged",
    "obey",
    "plans",
    "private_mounts",
    "schedule",
    "spared",
]
