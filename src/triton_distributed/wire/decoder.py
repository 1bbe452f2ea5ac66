"""Received bytes → frames."""

from __future__ import annotations

from typing import Final

from triton_distributed.wire.frames import DATA, HEADER, HEADER_BYTES, MAX_FRAME, MAX_HELLO

Frame = tuple[int, int, int, bytes]  # kind, flags, stream, payload

# The first two bytes of a TLS handshake and of a TLS alert, read as a little-endian number.
TLS_STARTS: Final = (0x0316, 0x0315)
# More frames than one read can hold: no limit.
UNLIMITED: Final = 1 << 62

_unpack: Final = HEADER.unpack_from


class FrameDecoder:
    """Cuts a byte stream into frames, whatever the pieces in which it comes.

    Each frame is a plain tuple in one list per read. This costs no more than cutting frames in the connection's own
    loop (docs/decisions/0001-wire.md), and it can be tested alone.

    Attributes:
        limit: the largest payload accepted, bytes: `MAX_HELLO` for the first frames, then `MAX_FRAME`.
        largest: after the hellos, the largest payload of a DATA frame. One above `MAX_FRAME` is never put together
            here: it becomes `partial`, and the caller takes it.
        hellos: number of frames left that are limited to `MAX_HELLO`.
        failure: why nothing more can be read, after a header exceeded the limit.
        more: `feed` stopped at its maximum number of frames: there may be another one.
        partial: header of the incomplete or large frame, as (kind, flags, stream, payload length), or None.
    """

    __slots__ = ("_at", "_have", "_parts", "failure", "hellos", "largest", "limit", "more", "partial")

    def __init__(self, hellos: int = 1) -> None:
        self.limit = MAX_HELLO
        self.largest = MAX_FRAME
        self.hellos = hellos
        self.failure: str | None = None
        self.more = False
        self.partial: tuple[int, int, int, int] | None = None
        self._parts: list[bytes] = []  # bytes of the incomplete frame, header included; under limit + one read
        self._at = 0  # offset of the unread rest in the first part; 0 unless `more`
        self._have = 0

    def feed(self, data: bytes, most: int = UNLIMITED) -> list[Frame]:
        """Return the first `most` frames that `data` completes, in order. Then check `failure` and `more`."""
        frames: list[Frame] = []
        if self.failure is not None:
            return frames
        at = 0
        if self._parts:
            if data:
                self._parts.append(data)
                self._have += len(data)
            if self.partial is not None and self._have < HEADER_BYTES + self.partial[3]:
                return frames  # joined once, when complete: linear even for tiny pieces
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
                if kind == DATA and limit == MAX_FRAME and size <= self.largest:
                    self.partial = (kind, flags, stream, size)
                    break
                self.failure = self._too_large(size, kind)
                return frames
            start = at + HEADER_BYTES
            stop = start + size
            if stop > end:
                self.partial = (kind, flags, stream, size)
                break
            frames.append((kind, flags, stream, data[start:stop]))
            at = stop
            if limit == MAX_HELLO:
                self.hellos -= 1
                if not self.hellos:
                    self.limit = limit = MAX_FRAME
        else:
            self.more = end - at >= HEADER_BYTES
        if at < end:
            self._have = end - at
            if self.more:  # the next call comes soon: do not copy a large read every few frames
                self._at = at
            elif at:
                data = data[at:]
            self._parts.append(data)
        return frames

    def take_partial(self) -> bytes:
        """Hand over what was received of the payload of `partial`; the caller receives the rest itself.

        After a large frame the bytes may contain what follows it: see `give_back`.
        """
        data = b"".join(self._parts)
        self._parts.clear()
        self.partial = None
        return data[HEADER_BYTES:]

    def give_back(self, data: bytes) -> None:
        """Put back what follows the payload that `take_partial` has handed over."""
        self._parts.append(data)
        self._have = len(data)
        self.more = self._have >= HEADER_BYTES

    def _too_large(self, size: int, kind: int) -> str:
        if self.limit == MAX_HELLO:
            if size & 0xFFFF in TLS_STARTS:
                return "the peer speaks TLS, and this end does not: see TRD_TLS_CERT, TRD_TLS_KEY and TRD_TLS_CA"
            return f"the first frame announces {size:,} bytes, a hello has at most {MAX_HELLO:,}: not this protocol"
        limit = self.largest if kind == DATA else MAX_FRAME
        return f"a frame of kind {kind} announces {size:,} bytes, the limit is {limit:,}"
