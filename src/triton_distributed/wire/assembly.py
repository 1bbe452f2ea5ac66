"""Messages that do not fit in one frame, or that have buffers after their body.

    one frame, no buffers       body
    one frame, BUFFERS          head, body, buffers
    several frames (MORE)       u64 total, then head (with BUFFERS), body, buffers; cut anywhere after the head

    head: u32 number of buffers, u32 body bytes, u64 bytes of each buffer
    with LENT on the first frame: the highest bit of a buffer's bytes says that it lies in shared memory and does not
    follow; then the head also has, for each of these, u64 segment and u64 offset in it. A segment of the receiver has
    RETURNED in its number.

Buffers are received in place: each has its own memory, and its fragments are copied, or read from the socket, directly
into it.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator, Sequence
from struct import Struct
from typing import TypeAlias

from triton_distributed.compiled import caused
from triton_distributed.errors import RemoteProtocolError
from triton_distributed.wire.frames import BUFFERS, LENT, MAX_FRAME, MORE, REQUEST_PREFIX_BYTES, UINT64

_HEAD = Struct("<II")
# A part larger than this, in bytes, is mapped, and its pages are touched only as bytes arrive; `wire.window` grants as
# much.
MAPPED = 4096
# Memory of at least this many bytes may use huge pages: filling 16 MiB takes 0.5 ms with them, and 6 ms without. But
# the first byte of a huge page takes some 0.3 ms, in which the loop does nothing else.
HUGE = 4 * 1024 * 1024
_PAGES: tuple[int | None, int | None] = getattr(mmap, "MADV_NOHUGEPAGE", None), getattr(mmap, "MADV_HUGEPAGE", None)
_PRIVATE = getattr(mmap, "MAP_PRIVATE", 2) | getattr(mmap, "MAP_ANONYMOUS", 0)
MAX_BUFFERS = (MAX_FRAME - _HEAD.size - UINT64.size) // UINT64.size
# A message with more buffers than this is not lent: its head fits in a frame, and borrowing takes little time.
MOST_LENT = 256
_LENT_BIT = 1 << 63
_PLACE = Struct("<QQ")
RETURNED = 1 << 63
Memory: TypeAlias = bytearray | mmap.mmap | memoryview
"""The memory of one buffer that arrived; a memoryview if it lies in shared memory."""
Place: TypeAlias = tuple[int, int]
"""Where a buffer lies in shared memory: a segment's id, and an offset in bytes."""
Borrow: TypeAlias = Callable[[int, int, int], memoryview]
"""Returns the shared memory at a segment, an offset and a size, or raises RemoteProtocolError."""
Body: TypeAlias = bytes | bytearray | memoryview


def borrow_nothing(segment: int, offset: int, size: int) -> memoryview:
    """The `Borrow` of an end that uses no shared memory.

    Raises:
        RemoteProtocolError: always.
    """
    raise RemoteProtocolError(f"a message refers to shared memory {segment}, which was not offered here")


def allocate(size: int) -> Memory:
    """Allocate writable memory of `size` bytes.

    Memory larger than a page is mapped: page-aligned, and touched only as bytes arrive. So a peer that announces a
    gigabyte, or a thousand messages, and sends nothing costs nothing.

    Raises:
        RemoteProtocolError: the system has no memory left.
    """
    try:
        if size <= MAPPED:
            return bytearray(size)
        return mmap.mmap(-1, size, flags=_PRIVATE)
    except (OSError, MemoryError, OverflowError) as error:
        raise caused(RemoteProtocolError(f"there is no memory for {size:,} bytes of a message: {error}"), error)


def head_of(body_bytes: int, buffers: Sequence[memoryview], places: Sequence[Place | None] = ()) -> bytes:
    """Return the head of a message with buffers.

    Args:
        places: of each buffer, where it lies in shared memory, or None; empty if none of them does.
    """
    sizes = [each.nbytes for each in buffers]
    if places:
        sizes = [size if place is None else size | _LENT_BIT for size, place in zip(sizes, places, strict=True)]
    head = _HEAD.pack(len(buffers), body_bytes) + b"".join([UINT64.pack(each) for each in sizes])
    return head + b"".join([_PLACE.pack(*place) for place in places if place is not None])


def message_bytes(body_bytes: int, buffers: Sequence[memoryview]) -> int:
    """Return the size that counts against `max_message_bytes`, at both ends: head, body and buffers.

    Raises:
        ValueError: there are more buffers than a head can list.
    """
    if len(buffers) > MAX_BUFFERS:
        raise ValueError(f"a message holds at most {MAX_BUFFERS:,} large arrays and buffers, not {len(buffers):,}")
    head = _HEAD.size + UINT64.size * len(buffers) if buffers else 0
    return head + body_bytes + sum(each.nbytes for each in buffers)


def request_bytes(metadata: bytes, body: Body, buffers: Sequence[memoryview]) -> int:
    """Return the size of a request that counts against `max_message_bytes`.

    Raises:
        Exception: as `message_bytes` raises it.
    """
    return message_bytes(REQUEST_PREFIX_BYTES + len(metadata) + len(body), buffers)


def one_frame(body: Body, buffers: Sequence[memoryview]) -> bytes:
    """Return the payload of a message that fits in one frame. If it has buffers, the frame carries `BUFFERS`."""
    return b"".join((head_of(len(body), buffers), body, *buffers)) if buffers else bytes(body)


def fragments(
    body: Body,
    buffers: Sequence[memoryview],
    flags: int,
    most: Callable[[], int],
    places: Sequence[Place | None] = (),
) -> Iterator[tuple[int, bytes, memoryview]]:
    """Cut a message into fragments: (flags, start of the payload, rest of the payload), each the payload of one frame.

    Args:
        flags: flags of the last frame; the others carry `MORE`.
        most: returns the largest size of the next fragment in bytes; called when that fragment is wanted. The first
            fragment does not ask: it has at most `MAX_FRAME` bytes.
        places: of each buffer, where it lies in shared memory, or None; empty if none of them does.

    Raises:
        ValueError: there are more buffers than a head can list.
    """
    total = message_bytes(len(body), buffers)
    head = b""
    if buffers:
        flags |= BUFFERS
        head = head_of(len(body), buffers, places)
        if places:
            buffers = [each for each, place in zip(buffers, places, strict=True) if place is None]
            total = len(head) + len(body) + sum(each.nbytes for each in buffers)
    first = LENT if places else 0
    if total <= MAX_FRAME:
        yield flags | first, b"".join((head, body, *buffers)), memoryview(b"")
        return
    start = UINT64.pack(total) + head
    left = total - len(head)
    for part in (memoryview(body), *buffers):
        at = 0
        while at < part.nbytes or (start and part.nbytes == 0):
            piece = part[at : at + (MAX_FRAME - len(start) if start else most())]
            at += piece.nbytes
            left -= piece.nbytes
            yield (flags & BUFFERS | MORE if left else flags) | first, start, piece
            start, first = b"", 0


def _read_head(first: bytes, at: int) -> tuple[tuple[int, ...], int, int]:
    if len(first) < at + _HEAD.size:
        raise RemoteProtocolError("a message with buffers begins without its head")
    number, size = _HEAD.unpack_from(first, at)
    at += _HEAD.size
    if number > MAX_BUFFERS or len(first) < at + number * UINT64.size:
        raise RemoteProtocolError(f"a message's head names {number:,} buffers and is cut short")
    return Struct(f"<{number}Q").unpack_from(first, at), size, at + number * UINT64.size


def _read_places(sizes: Sequence[int], first: bytes, at: int) -> tuple[list[tuple[int, int, int] | None], int]:
    """Return the arguments of `Borrow` for each buffer, or None for one that follows, and where the head ends."""
    if len(sizes) > MOST_LENT:
        raise RemoteProtocolError(f"a message with shared memory has {len(sizes):,} buffers, the limit is {MOST_LENT}")
    places: list[tuple[int, int, int] | None] = []
    for size in sizes:
        if not size & _LENT_BIT:
            places.append(None)
            continue
        if len(first) < at + _PLACE.size:
            raise RemoteProtocolError("a message's head lacks the places of its shared memory")
        places.append((*_PLACE.unpack_from(first, at), size ^ _LENT_BIT))
        at += _PLACE.size
    return places, at


def decline(flags: int, first: bytes, borrow: Borrow) -> None:
    """Give back the shared memory of a message that is not read, from its first frame.

    Raises:
        RemoteProtocolError: the frame is malformed.
    """
    if flags & LENT and flags & BUFFERS:
        sizes, _, at = _read_head(first, UINT64.size if flags & MORE else 0)
        for each in _read_places(sizes, first, at)[0]:
            if each is not None:
                borrow(*each)  # The result is dropped, which releases it.


class Assembly:
    """A message that is being assembled.

    Args:
        kind: kind of its first frame, REQUEST or DATA; later frames are DATA.
        flags: flags of its first frame.
        first: payload of its first frame.
        limit: the largest message accepted, bytes.
        borrow: finds the buffers that lie in shared memory.

    Attributes:
        granted: the sender has credit for the whole message.
        left: bytes that have not arrived yet.
        lent_bytes: bytes in shared memory.

    Raises:
        RemoteProtocolError: the message exceeds the limit, or its sizes contradict each other.
    """

    __slots__ = ("_lent", "_quick", "_sizes", "_view", "granted", "kind", "left", "lent_bytes", "parts", "total")

    def __init__(self, kind: int, flags: int, first: bytes, limit: int, borrow: Borrow = borrow_nothing) -> None:
        self.kind = kind
        self.granted = False
        self.lent_bytes = 0
        self._lent: list[memoryview | None] = []  # of each buffer, its shared memory; empty if none has any
        at = 0
        if flags & MORE:
            if len(first) < UINT64.size:
                raise RemoteProtocolError("a fragmented message begins without its length")
            (self.total,) = UINT64.unpack_from(first)
            at = UINT64.size
        else:
            self.total = len(first)
        if self.total > limit:
            raise RemoteProtocolError(f"a message announces {self.total:,} bytes, the limit is {limit:,}")
        size = self.total
        sizes: tuple[int, ...] = ()
        start = at
        if flags & BUFFERS:
            sizes, size, at = _read_head(first, at)
            if flags & LENT:
                places, at = _read_places(sizes, first, at)
                self._lent = [None if each is None else borrow(*each) for each in places]
                sizes = tuple(size for size, place in zip(sizes, places, strict=True) if place is None)
                self.lent_bytes = sum(each.nbytes for each in self._lent if each is not None)
                if self.total + self.lent_bytes > limit:
                    raise RemoteProtocolError(f"a message with shared memory exceeds the limit of {limit:,} bytes")
        self.left = self.total - (at - start)
        if size + sum(sizes) != self.left:
            raise RemoteProtocolError("the lengths in a message's head do not add up to its total")
        self.parts: list[Memory] = []  # body, then buffers; each is made when its first byte arrives
        self._sizes = iter((size, *sizes))
        self._view = memoryview(b"")
        self._quick: bool | None = None  # the choice of `expect` for the last part
        self.write(memoryview(first)[at:])

    def _part(self) -> memoryview:
        """Return the rest of the part that the next byte belongs to; memory is made when its first byte arrives."""
        while not self._view.nbytes and (size := next(self._sizes, None)) is not None:
            self._make(size)
        return self._view

    def _make(self, size: int) -> None:
        self.parts.append(allocate(size))
        self._view = memoryview(self.parts[-1])
        self._quick = None

    def expect(self, quick: bool) -> None:
        """Choose the size of the pages from the next byte on.

        Args:
            quick: True if all pages together should take little time, False if no single one may take long.
        """
        if quick is not self._quick and self.granted and self._part().nbytes >= HUGE:
            memory = self.parts[-1]
            advice = _PAGES[quick]
            if isinstance(memory, mmap.mmap) and advice is not None:
                start = len(memory) - self._view.nbytes
                with contextlib.suppress(OSError):  # The kernel may lack huge pages.
                    memory.madvise(advice, start - start % mmap.PAGESIZE)
            self._quick = quick

    def target(self, most: int) -> memoryview:
        """Return the memory for the next bytes, at most `most` of them; call `advance` after they are written."""
        return self._part()[:most]

    def advance(self, count: int) -> None:
        """Note that `count` bytes were written to `target()`."""
        self._view = self._view[count:]
        self.left -= count

    def write(self, data: memoryview) -> None:
        """Copy the next bytes into place.

        Raises:
            RemoteProtocolError: there are more bytes than were announced.
        """
        if data.nbytes > self.left:
            raise RemoteProtocolError("a message's fragments are longer than it announced")
        while data.nbytes:
            if not self._view.nbytes and (size := next(self._sizes, None)) is not None:
                if size <= data.nbytes:  # it arrived whole: no map needed, the kernel allows 65,530 a process
                    self.parts.append(bytearray(data[:size]))
                    self.left -= size
                    data = data[size:]
                    continue
                self._make(size)
            part = self._view
            count = min(data.nbytes, part.nbytes)
            part[:count] = data[:count]
            self.advance(count)
            data = data[count:]

    def finish(self) -> tuple[Body, list[Memory]]:
        """Return the body and the buffers, after the last fragment.

        Raises:
            RemoteProtocolError: bytes are missing.
        """
        if self.left:
            raise RemoteProtocolError(f"a message's last fragment leaves {self.left:,} announced bytes missing")
        self._part()  # makes the parts of no bytes
        self._view = memoryview(b"")
        body, buffers = self.parts[0], self.parts[1:]
        if self._lent:
            own = iter(buffers)
            buffers = [next(own) if each is None else each for each in self._lent]
        return body if isinstance(body, bytearray) else memoryview(body), buffers
