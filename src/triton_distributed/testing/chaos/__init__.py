"""Chaos runs: a seeded schedule of faults against workers under load, and an oracle that judges every request."""

from triton_distributed.testing.chaos.oracle import Oracle, Ticket
from triton_distributed.testing.chaos.requests import Journal, Plan, Shape, Variety, Work, echo, handler, plans
from triton_distributed.testing.chaos.schedule import LASTING, Fault, FaultKind, Recovery, schedule, spared

__all__ = [
    "LASTING",
    "Fault",
    "FaultKind",
    "Journal",
    "Oracle",
    "Plan",
    "Recovery",
    "Shape",
    "Ticket",
    "Variety",
    "Work",
    "echo",
    "handler",
    "plans",
    "schedule",
    "spared",
]
