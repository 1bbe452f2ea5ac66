"""The messages that a session over NATS consists of.

Each is a 17-byte little-endian header and a payload, published on the subject of the other end, with the sender's own
subject as the reply subject:

    kind        u8     one of `Kind`
    sequence    u64    of a DATA its number, from 0; of the others the number that the next DATA will have
    received    u64    bytes of DATA messages, headers included, that the sender has had from the other end

So every message tells whether one before it was lost, and acknowledges. The reply subject has the server answer with
"no responders" where the other end is gone.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

HEADER = Struct("<BQQ")
HEADER_BYTES = HEADER.size

MAGIC = b"TRDN"
VERSION = 1
# The payload of OPEN and OPENED: magic, version, bytes of DATA that the sender takes unacknowledged.
OPENING = Struct("<4sBI")


class Kind(IntEnum):
    """What a message says."""

    OPEN = 1  # to the subject that a worker listens on: begin a session with my reply subject
    OPENED = 2  # the answer; its reply subject is the worker's end of the session
    DATA = 3  # the next bytes
    ACK = 4  # nothing but its header
    BEAT = 5  # this end is alive
    ASK = 6  # answer with a BEAT, now
    CLOSE = 7  # this end is gone; why, in words, unless it closed as it should


OPEN, OPENED, DATA, ACK, BEAT, ASK, CLOSE = map(int, Kind)


def opening(kind: int, window: int) -> bytes:
    """An OPEN or OPENED."""
    return HEADER.pack(kind, 0, 0) + OPENING.pack(MAGIC, VERSION, window)


def read_opening(data: bytes) -> tuple[int, int]:
    """The version and window of an OPEN or OPENED; (0, 0) for any other message."""
    if len(data) < HEADER_BYTES + OPENING.size:
        return 0, 0
    magic, version, window = OPENING.unpack_from(data, HEADER_BYTES)
    return (version, window) if magic == MAGIC else (0, 0)
