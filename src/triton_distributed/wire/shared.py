"""What the two ends of a session say about shared memory: the payloads of MEMORY frames.

    sender of a message                           its receiver
    OFFERED   a segment: where it is              TAKEN      it is mapped here, or
                                                  REFUSED    it cannot be used
    a message with `LENT` refers to a segment     RELEASED   that buffer is not used any more, or
                                                  KEPT       nor is it, but a child of the process may still read it
    WITHDRAWN no message refers to it any more

The receiver may use a buffer in a message of its own: it refers to the segment by its id with `RETURNED`, and the
sender of the segment then uses the buffer, too.

Each message answers with one RELEASED or KEPT for each buffer that it refers to, also if its stream is over. The sender
writes to a segment only while no buffer in it is used; after KEPT, and after the session is lost, never again.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import NamedTuple

from triton_distributed.errors import RemoteProtocolError
from triton_distributed.wire.frames import MEMORY, frame

_OFFER = Struct("<BQQQ16s?")
_ABOUT = Struct("<BQ")


class Said(IntEnum):
    """What a MEMORY frame says: its first byte."""

    OFFERED = 0
    TAKEN = 1
    REFUSED = 2
    RELEASED = 3
    KEPT = 4
    WITHDRAWN = 5


class Offer(NamedTuple):
    """A segment that the peer may map.

    Attributes:
        segment: its id.
        size: bytes.
        descriptor: the number of its descriptor in the sender's process.
        cookie: 16 random bytes that only this segment has.
        returnable: a message from the peer may refer to a buffer in it that the peer still uses.
    """

    segment: int
    size: int
    descriptor: int
    cookie: bytes
    returnable: bool = False


def offer_frame(offer: Offer) -> bytes:
    """Return a frame that offers a segment."""
    return frame(MEMORY, 0, _OFFER.pack(Said.OFFERED, *offer))


def memory_frame(said: Said, segment: int) -> bytes:
    """Return a frame that says something about one segment."""
    return frame(MEMORY, 0, _ABOUT.pack(said, segment))


def read_memory(payload: bytes) -> tuple[Said, Offer | int]:
    """Read the payload of a MEMORY frame: what it says, and the offer or the segment's id.

    Raises:
        RemoteProtocolError: it is malformed.
    """
    if len(payload) == _OFFER.size and payload[0] == Said.OFFERED:
        return Said.OFFERED, Offer._make(_OFFER.unpack(payload)[1:])
    if len(payload) == _ABOUT.size and Said.TAKEN <= payload[0] <= Said.WITHDRAWN:
        said, segment = _ABOUT.unpack(payload)
        return Said(said), segment
    raise RemoteProtocolError("a MEMORY frame is malformed")
