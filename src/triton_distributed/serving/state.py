"""The states of a served request, in the order in which it passes them.

WAITING ──admitted──▶ ANNOUNCED ──first step──▶ RUNNING ──cancelled──▶ CLEANING
   └─refused, cancelled─┴─cancelled──▶ OVER ◀──ended──┴──────ended────────┘
"""

from __future__ import annotations

from enum import IntEnum


class RequestState(IntEnum):
    """Where a served request is."""

    WAITING = 0  # not admitted: it was just received, or it waits in the queue
    ANNOUNCED = 1  # admitted: its ACCEPT is on the way, and its handler has not taken its first step
    RUNNING = 2  # the handler runs
    CLEANING = 3  # the handler was cancelled and has not ended
    OVER = 4  # nothing of it is left to do


# Plain integers: one such comparison is on the way of each request, and enum members compare more slowly.
WAITING, ANNOUNCED, RUNNING, CLEANING, OVER = map(int, RequestState)
