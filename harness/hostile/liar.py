"""A worker that lies to its clients: it answers hellos correctly, and every request with the present lie."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from harness.hostile.raw import HELLO
from triton_distributed.wire import frames as f
from triton_distributed.wire.decoder import FrameDecoder

PIECE = 1000  # The number of frames made at once.


def beyond_credit(stream: int) -> Iterator[bytes]:
    """Items without end, without regard to credit."""
    while True:
        yield f.frame(f.DATA, stream, bytes(60_000)) * 10


def nobodys_items(stream: int) -> Iterator[bytes]:
    """Items for a stream that is over."""
    yield f.frame(f.DATA, stream, b"\x01", f.END)
    while True:
        yield f.frame(f.DATA, stream, b"\x01") * PIECE


def unknown_items(stream: int) -> Iterator[bytes]:
    """Items for streams that were never opened."""
    while True:
        yield f.frame(f.DATA, stream + 1_000_000, b"\x01")


def ends_twice(stream: int) -> Iterator[bytes]:
    """END, and END again."""
    while True:
        yield f.frame(f.END_OF_STREAM, stream, b"", f.END) * 2


def sizes(stream: int) -> Iterator[bytes]:
    """Sizes that announce more than is sent, or more than a client accepts."""
    bombs = (
        f.HEADER.pack(2**32 - 1, f.DATA, 0, stream),
        f.frame(f.DATA, stream, f.UINT64.pack(2**63), f.MORE),
        f.frame(f.DATA, stream, f.UINT64.pack(1 << 30) + b"x", f.MORE),
        f.frame(f.BATCH, stream, b"\xdd" + b"\xff" * 4, f.END),
        f.frame(f.DATA, stream, b"\x91" * 200_000, f.END),
        f.frame(f.ERROR, stream, b"\0" + b"\xdf" + b"\xff" * 4),
        f.frame(f.BATCH, stream, b"\x05", f.END),
        f.frame(f.DATA, stream, b"\x05", f.END | f.ANNOTATED),
        f.frame(f.DATA, stream, b"\x05", f.END | f.CHECKPOINT),
    )
    yield bombs[stream % len(bombs)]


def pongs(stream: int) -> Iterator[bytes]:
    """PONG frames without a PING, and no answers."""
    while True:
        yield f.frame(f.PONG, 0, b"pong") * PIECE


def pings(stream: int) -> Iterator[bytes]:
    """PING frames without end."""
    while True:
        yield f.frame(f.PING, 0, bytes(64)) * PIECE


def silence(stream: int) -> Iterator[bytes]:
    """ACCEPT, and nothing more."""
    yield f.frame(f.ACCEPT, 0, f.UINT64.pack(stream))


LIES = {
    f"lie_{each.__name__}": each
    for each in (beyond_credit, nobodys_items, unknown_items, ends_twice, sizes, pongs, pings, silence)
}


class Liar:
    """The listener, and the lie that it tells.

    Attributes:
        lie: called with the stream of a request; yields the bytes to send.
        said: the number of bytes sent.
    """

    def __init__(self) -> None:
        self.lie = silence
        self.said = 0

    def tell(self, lie: str) -> dict[str, int]:
        """Tell this lie from now on, or none; return the number of bytes sent since the previous lie began."""
        said, self.said = self.said, 0
        self.lie = LIES.get(lie, silence)
        return {"bytes": said}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = FrameDecoder()
        writer.write(HELLO)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                for kind, _, number, _ in decoder.feed(data):
                    if kind == f.REQUEST:
                        await self._tell(writer, number)
        writer.close()

    async def _tell(self, writer: asyncio.StreamWriter, number: int) -> None:
        lie = self.lie
        for piece in lie(number):
            if self.lie is not lie or writer.is_closing():
                return
            self.said += len(piece)
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
