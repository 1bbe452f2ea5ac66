"""The messages of a session over NATS.

Each is a 17-byte little-endian header and a payload. It is published on the subject of the other end, with the sender's
own subject as the reply subject:

    kind        u8     one of `Kind`
    sequence    u64    in a DATA its number, from 0; in others the number that the next DATA will have
    received    u64    bytes of DATA messages, headers included, that the sender has received from the other end

So every message shows whether an earlier one was lost, and acknowledges what has been received. Because of the reply
subject, the server answers with "no responders" if the other end is gone.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

HEADER = Struct("<BQQ")
HEADER_BYTES = HEADER.size

MAGIC = b"TRDN"
VERSION = 1
# The payload of OPEN and OPENED: magic, version, bytes of DATA that may be sent to the sender unacknowledged.
OPENING = Struct("<4sBI")


class Kind(IntEnum):
    """The kind of a message."""

    OPEN = 1  # to a worker's listening subject: begin a session with the reply subject
    OPENED = 2  # the answer to OPEN; its reply subject is the worker's end of the session
    DATA = 3  # the next bytes
    ACK = 4  # only a header
    BEAT = 5  # this end is alive
    ASK = 6  # answer with a BEAT, now
    CLOSE = 7  # this end is gone; the reason as text, empty if it closed normally


OPEN, OPENED, DATA, ACK, BEAT, ASK, CLOSE = map(int, Kind)


def opening(kind: int, window: int) -> bytes:
    """Return an OPEN or OPENED."""
    return HEADER.pack(kind, 0, 0) + OPENING.pack(MAGIC, VERSION, window)


def read_opening(data: bytes) -> tuple[int, int]:
    """Return the version and window of an OPEN or OPENED; (0, 0) for any other message."""
    if len(data) < HEADER_BYTES + OPENING.size:
        return 0, 0
    magic, version, window = OPENING.unpack_from(data, HEADER_BYTES)
    return (version, window) if magic == MAGIC else (0, 0)
