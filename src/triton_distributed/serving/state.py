"""The states of a served request, in the order in which it passes them.

WAITING ──admitted──▶ ANNOUNCED ──first step──▶ RUNNING ──cancelled──▶ CLEANING
   └─refused, cancelled─┴─cancelled──▶ OVER ◀──ended──┴──────ended────────┘
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class RequestState(IntEnum):
    """The state of a served request."""

    WAITING = 0  # The request is not admitted: it was just received, or it waits in the queue.
    ANNOUNCED = 1  # The request is admitted and its ACCEPT is on the way. The handler has not taken its first step.
    RUNNING = 2  # The handler runs.
    CLEANING = 3  # The handler was cancelled and has not ended.
    OVER = 4  # The request has ended.


# Plain integers, because each request compares its state, and enum members compare more slowly.
WAITING: Final = 0
ANNOUNCED: Final = 1
RUNNING: Final = 2
CLEANING: Final = 3
OVER: Final = 4
