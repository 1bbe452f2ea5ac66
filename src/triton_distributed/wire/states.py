"""The states of a stream, in one table for both roles.

A stream has two halves: what this end sends and what it receives. The END flag closes a half; an abort (ERROR, REJECT,
CANCEL) closes both. The same table serves the end that opened the stream and the end that accepted it. What one end
may send in a state is what the other may receive in the mirrored state:

    IDLE ──open──▶ OPEN ──we end──▶ SENT ──they end──▶ CLOSED
                     └───they end─▶ RECEIVED ──we end──▶┘            any state ──abort──▶ CLOSED

A frame for a stream that is CLOSED here was sent before the peer could know, and is ignored. Every combination that the
table does not list is a protocol error.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from triton_distributed.wire.frames import END, GRACEFUL, Kind


class State(IntEnum):
    """The state of a stream at one end."""

    IDLE = 0
    OPEN = 1
    SENT = 2  # we have ended, the peer has not
    RECEIVED = 3  # the peer has ended, we have not
    CLOSED = 4


class Input(IntEnum):
    """What a frame does to a stream."""

    OPEN = 0
    OPEN_END = 1
    DATA = 2
    DATA_END = 3
    ABORT = 4
    NOTE = 5  # CREDIT, ACCEPT, graceful CANCEL: neither half changes


# The same states as plain numbers, which compiled code compares without an object.
IDLE: Final = 0
OPEN: Final = 1
SENT: Final = 2
RECEIVED: Final = 3
CLOSED: Final = 4
ILLEGAL: Final = -1

# SENDING[state][input] is the state after we send; the rows are IDLE, OPEN, SENT, RECEIVED, CLOSED and the columns
# OPEN, OPEN_END, DATA, DATA_END, ABORT, NOTE.
SENDING: Final[tuple[tuple[int, ...], ...]] = (
    (OPEN, SENT, ILLEGAL, ILLEGAL, ILLEGAL, ILLEGAL),
    (ILLEGAL, ILLEGAL, OPEN, SENT, CLOSED, OPEN),
    (ILLEGAL, ILLEGAL, ILLEGAL, ILLEGAL, CLOSED, SENT),
    (ILLEGAL, ILLEGAL, RECEIVED, CLOSED, CLOSED, RECEIVED),
    (ILLEGAL, ILLEGAL, ILLEGAL, ILLEGAL, ILLEGAL, ILLEGAL),
)
MIRROR: Final = (IDLE, OPEN, RECEIVED, SENT, CLOSED)
# RECEIVING is the mirror of SENDING, except that a closed stream ignores frames that were already under way.
RECEIVING: Final[tuple[tuple[int, ...], ...]] = tuple(
    (ILLEGAL, ILLEGAL, CLOSED, CLOSED, CLOSED, CLOSED)
    if state == CLOSED
    else tuple(ILLEGAL if after == ILLEGAL else MIRROR[after] for after in SENDING[MIRROR[state]])
    for state in (IDLE, OPEN, SENT, RECEIVED, CLOSED)
)


def input_of(kind: int, flags: int) -> int:
    """Return the `Input` for a frame of this kind and flags; `ILLEGAL` if the kind does not belong to a stream."""
    return INPUTS[kind][flags & END] if kind != Kind.CANCEL else Input.NOTE if flags & GRACEFUL else Input.ABORT


# INPUTS[kind][END flag], for the kinds that belong to a stream.
_INPUTS: dict[int, tuple[int, int]] = {
    Kind.REQUEST: (Input.OPEN, Input.OPEN_END),
    Kind.DATA: (Input.DATA, Input.DATA_END),
    Kind.BATCH: (Input.DATA, Input.DATA_END),
    Kind.END: (Input.DATA_END, Input.DATA_END),
    Kind.ERROR: (Input.ABORT, Input.ABORT),
    Kind.REJECT: (Input.ABORT, Input.ABORT),
    Kind.CANCEL: (Input.ABORT, Input.ABORT),
    Kind.CREDIT: (Input.NOTE, Input.NOTE),
    Kind.ACCEPT: (Input.NOTE, Input.NOTE),
}
INPUTS: Final = tuple(_INPUTS.get(kind, (ILLEGAL, ILLEGAL)) for kind in range(256))
