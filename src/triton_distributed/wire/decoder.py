"""Received bytes → frames."""

from __future__ import annotations

from triton_distributed.wire.frames import HEADER, HEADER_BYTES, MAX_FRAME, MAX_HELLO

Frame = tuple[int, int, int, bytes]  # kind, flags, stream, payload

# The first two bytes of a TLS handshake and of a TLS alert, read as a little-endian number.
TLS_STARTS = (0x0316, 0x0315)
# This many frames are more than one read can hold.
UNLIMITED = 1 << 62

_unpack = HEADER.unpack_from


class FrameDecoder:
    """Cuts a byte stream into frames, whatever pieces it comes in.

    A plain tuple per frame in a list per read: measured beside frames cut inside the connection's own loop it costs
    nothing (docs/decisions/0001-wire.md), and it can be tested alone.

    Attributes:
        limit: the largest payload taken, bytes: a hello's for the first frames, then a frame's.
        hellos: how many first frames that are.
        failure: why nothing more can be read, once a header is beyond the limit.
        more: `feed` stopped because it had cut as many frames as it was asked for: there may be another one.
        partial: header of the frame that is under way, as (kind, flags, stream, payload length), or None.
    """

    __slots__ = ("_at", "_have", "_parts", "failure", "hellos", "limit", "more", "partial")

    def __init__(self, hellos: int = 1) -> None:
        self.limit = MAX_HELLO
        self.hellos = hellos
        self.failure: str | None = None
        self.more = False
        self.partial: tuple[int, int, int, int] | None = None
        self._parts: list[bytes] = []  # what is here of the frame under way, header included; under limit + one read
        self._at = 0  # where what is left of the first part begins: 0 unless there is more
        self._have = 0

    def feed(self, data: bytes, most: int = UNLIMITED) -> list[Frame]:
        """The first `most` frames that `data` completes, in order. Check `failure` and `more` after using them."""
        frames: list[Frame] = []
        if self.failure is not None:
            return frames
        at = 0
        if self._parts:
            if data:
                self._parts.append(data)
                self._have += len(data)
            if self.partial is not None and self._have < HEADER_BYTES + self.partial[3]:
                return frames  # joined once when complete: linear however small the pieces are
            if len(self._parts) == 1:
                data, at = self._parts[0], self._at
            else:
                data = b"".join([memoryview(self._parts[0])[self._at :], *self._parts[1:]])
            self._parts.clear()
            self._at = 0
        end, limit = len(data), self.limit
        self.partial = None
        self.more = False
        for _ in range(most):
            if end - at < HEADER_BYTES:
                break
            size, kind, flags, stream = _unpack(data, at)
            if size > limit:
                self.failure = self._too_large(size, kind)
                return frames
            start = at + HEADER_BYTES
            stop = start + size
            if stop > end:
                self.partial = (kind, flags, stream, size)
                break
            frames.append((kind, flags, stream, data[start:stop]))
            at = stop
            if limit is MAX_HELLO:
                self.hellos -= 1
                if not self.hellos:
                    self.limit = limit = MAX_FRAME
        else:
            self.more = end - at >= HEADER_BYTES
        if at < end:
            self._have = end - at
            if self.more:  # the next call comes soon: no copy of a large read for every few frames
                self._at = at
            elif at:
                data = data[at:]
            self._parts.append(data)
        return frames

    def take_partial(self) -> bytes:
        """Hand over what is here of the payload under way; the caller receives the rest itself."""
        data = b"".join(self._parts)
        self._parts.clear()
        self.partial = None
        return data[HEADER_BYTES:]

    def _too_large(self, size: int, kind: int) -> str:
        if self.limit == MAX_HELLO:
            if size & 0xFFFF in TLS_STARTS:
                return "the peer speaks TLS, and this end does not: see TRD_TLS_CERT, TRD_TLS_KEY and TRD_TLS_CA"
            return f"the first frame announces {size:,} bytes, a hello has at most {MAX_HELLO:,}: not this protocol"
        return f"a frame of kind {kind} announces {size:,} bytes, the limit is {MAX_FRAME:,}"
