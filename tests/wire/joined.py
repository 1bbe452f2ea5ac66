"""Two connections joined by bytes that a test holds in its hands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from triton_distributed.errors import RemoteProtocolError
from triton_distributed.wire import frames as f
from triton_distributed.wire.authentication import Authentication
from triton_distributed.wire.connection import Connection, Shell
from triton_distributed.wire.decoder import Frame, FrameDecoder
from triton_distributed.wire.hello import Hello, hello_frame
from triton_distributed.wire.stream import Link, StreamCore

FOREVER = float("inf")
WINDOW = 64 * 1024


class Noted(StreamCore):
    """A stream that notes what its shell would be told."""

    def __init__(self, connection: Link, stream_id: int, credit: int, window: int) -> None:
        super().__init__(connection, stream_id, credit, window)
        self.told: list[str] = []

    def on_readable(self) -> None:
        self.told.append("readable")

    def on_writable(self) -> None:
        self.told.append("writable")

    def on_stop(self) -> None:
        self.told.append("stop")

    def on_closed(self) -> None:
        self.told.append("closed")


class Told(Shell):
    """A shell that notes what it is told."""

    def __init__(self) -> None:
        self.goaways: list[tuple[int, str]] = []
        self.pongs: list[bytes] = []
        self.hellos: list[Hello] = []
        self.scheduled = 0

    def schedule(self) -> None:
        self.scheduled += 1

    def on_hello(self, peer: Hello) -> None:
        self.hellos.append(peer)

    def on_goaway(self, code: int, words: str) -> None:
        self.goaways.append((code, words))

    def on_pong(self, payload: bytes) -> None:
        self.pongs.append(payload)


class End(Connection[Noted]):
    """One end, with what its shell was told."""

    def __init__(
        self,
        hello: Hello | None = None,
        *,
        window: int = WINDOW,
        session_window: int = 1 << 26,
        authentication: Authentication | None = None,
    ) -> None:
        told = Told()
        super().__init__(told, Noted, hello or Hello(window=window), window, session_window, authentication)
        self.session_window = session_window
        self.requests: list[tuple[Any, ...]] = []
        self.told = told
        self.goaways, self.pongs, self.hellos = told.goaways, told.pongs, told.hellos
        self.on_request = lambda stream, *request: self.requests.append((stream, *request))

    @property
    def scheduled(self) -> int:
        """How often output was announced."""
        return self.told.scheduled

    def take(self, data: bytes, in_place: bool = False) -> None:
        """Receive as the shell does: what belongs into a message under way is written there.

        Args:
            in_place: as from a socket, which reads the bytes of a fragment and the header after it into the message.
        """
        while in_place and self.direct is not None and data:
            target = self.direct.target()
            count = min(target.nbytes, len(data))
            target[:count] = data[:count]
            following = self.direct_received(count)
            if following:
                self.receive(following)
            data = data[count:]
        self.receive(self.copy_direct(data))

    def written(self) -> list[Frame]:
        """The frames that wait, taken."""
        return frames_of(self.take_output())


def frames_of(data: bytes) -> list[Frame]:
    """Bytes as frames, whatever they hold."""
    decoder = FrameDecoder()
    decoder.limit = f.MAX_FRAME
    found = decoder.feed(data)
    assert decoder.failure is None
    assert decoder.partial is None
    return found


def greeted(hello: Hello | None = None, *, peer: Hello | None = None, **options: Any) -> End:
    """An end that has exchanged hellos and has nothing to send."""
    end = End(hello, **options)
    end.receive(hello_frame(peer or Hello(window=WINDOW)))
    end.take_output()
    return end


def joined(**options: Any) -> tuple[End, End]:
    """A client and a server, greeted."""
    client, server = End(**options), End(**options)
    for each in (client, server):
        each.greet()
    client.receive(server.take_output())
    server.receive(client.take_output())
    return client, server


def request(
    number: int,
    body: bytes = b"",
    *,
    flags: int = f.END,
    timeout: float = FOREVER,
    window: int = WINDOW,
    metadata: bytes = b"",
    announced: int | None = None,
) -> bytes:
    """A REQUEST for endpoint 2 of instance 1."""
    extra = len(metadata) if announced is None else announced
    return f.frame(f.REQUEST, number, f.REQUEST_PREFIX.pack(1, 2, timeout, window, extra) + metadata + body, flags)


def opened(client: End, server: End, *, end: bool = True) -> tuple[Noted, Noted]:
    """Both ends of a new stream."""
    mine = client.open_stream(end)
    client.send(request(mine.id, flags=f.END if end else 0, window=mine.window))
    server.take(client.take_output())
    return mine, server.requests[-1][0]


def move(one: End, other: End) -> None:
    """Carry what waits, until neither end has anything to say."""
    while one_way := (one.take_output(), other.take_output()):
        if not any(one_way):
            return
        other.take(one_way[0])
        one.take(one_way[1])


def three_ways(data: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """The same bytes as three kinds of reads."""
    yield "whole", [data]
    yield "one byte at a time", [data[at : at + 1] for at in range(len(data))]
    yield "with a tail", [data[: len(data) // 2 + 1], data[len(data) // 2 + 1 :]]


def receive_all(end: End, pieces: Iterable[bytes]) -> str | None:
    """Feed pieces; returns the words of the protocol error that ended it, if one did."""
    try:
        for piece in pieces:
            end.take(piece)
    except RemoteProtocolError as error:
        return str(error)
    return None
