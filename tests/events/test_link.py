"""What a publisher writes and a subscriber reads: whole, byte by byte, damaged."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from tests.runtime.cluster import turns, until
from triton_distributed.errors import DecodeError
from triton_distributed.events import link as module
from triton_distributed.events.link import HEAD, PREFACE, FrameReader, Link

Got = list[tuple[str, bytes, int]]


def frame(subject: str, data: bytes, lost: int = 0) -> bytes:
    return HEAD.pack(len(data), lost, len(subject.encode())) + subject.encode() + data


STREAM = PREFACE + frame("a", b"") + frame("a.b", b"x" * 300, 7) + frame("a", b"y")
EVENTS = [("a", b"", 0), ("a.b", b"x" * 300, 7), ("a", b"y", 0)]


@pytest.mark.parametrize("step", [1, 2, 7, 100, len(STREAM)])
def test_read_in_pieces(step):
    got: Got = []
    reader = FrameReader(1000, lambda *event: got.append(event))
    for at in range(0, len(STREAM), step):
        reader.feed(STREAM[at : at + step])
    assert got == EVENTS


def test_each_event_is_there_with_its_last_byte():
    got: Got = []
    reader = FrameReader(1000, lambda *event: got.append(event))
    reader.feed(STREAM[:-1])
    assert got == EVENTS[:-1]
    reader.feed(STREAM[-1:])
    assert got == EVENTS


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n", PREFACE.replace(b"\x01", b"\x02"), PREFACE + frame("a", b"x" * 1001)]
)
def test_another_protocol_or_too_much_is_refused(data):
    got: Got = []
    with pytest.raises(DecodeError):
        FrameReader(1000, lambda *event: got.append(event)).feed(data)
    assert got == []


class End:
    """A link and the socket at whose other end a test reads, or does not."""

    def __init__(self) -> None:
        mine, self.other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        mine.setblocking(False)
        self.other.setblocking(False)
        self.lost: list[Link] = []
        self.link = Link(asyncio.get_running_loop(), mine, "there", self.lost.append)
        self.got: Got = []
        self._reader = FrameReader(1 << 30, lambda *event: self.got.append(event))

    def read(self) -> bool:
        """Read what is there; False when nothing is."""
        try:
            data = self.other.recv(1 << 20)
        except BlockingIOError:
            return False
        self._reader.feed(data)
        return bool(data)


@pytest.fixture
async def end() -> AsyncIterator[End]:
    made = End()
    yield made
    made.link.close()
    made.other.close()


@pytest.mark.any_loop
async def test_the_first_leaves_at_once_and_the_rest_of_the_turn_together(end: End):
    end.link.send("a", b"1")
    end.read()
    assert end.got == [("a", b"1", 0)]
    end.link.send("a", b"2")
    end.link.send("b", b"3")
    assert not end.read()
    await turns(2)
    end.read()
    assert end.got[1:] == [("a", b"2", 0), ("b", b"3", 0)]
    assert end.link.idle


@pytest.mark.any_loop
async def test_who_does_not_read_loses_the_oldest_and_hears_how_many(end: End, monkeypatch, caplog):
    monkeypatch.setattr(module, "MAX_EVENTS", 10)
    for number in range(200):
        end.link.send("a" if number % 2 else "b", b"%3d" % number + bytes(20_000))
        await asyncio.sleep(0)
    assert not end.link.idle
    assert len([each for each in caplog.messages if "does not read" in each]) == 1
    end.link.send("c", b"end")

    def read_to_the_end() -> bool:
        end.read()
        return end.got[-1:] == [("c", b"end", 0)]

    await until(read_to_the_end)
    numbers = [int(data[:3]) for _, data, _ in end.got[:-1]]
    assert numbers == sorted(set(numbers))
    assert numbers[:10] == list(range(10))  # in the kernel's hands before it was full
    assert numbers[-9:] == list(range(191, 200))
    for subject, of in (("a", 100), ("b", 100)):
        assert sum(1 + lost for name, _, lost in end.got if name == subject) == of
    await until(lambda: end.link.idle)


async def test_bytes_are_bounded_too_and_the_last_event_stays(end: End, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 100_000)
    for _ in range(50):
        end.link.send("a", bytes(60_000))
    assert end.link._bytes <= 100_000
    end.link.send("a", b"x" * 500_000)
    assert end.link._bytes == 500_000


@pytest.mark.any_loop
async def test_a_broken_link_says_so_once(end: End):
    end.link.send("a", b"1")
    end.other.close()
    await turns(2)
    for _ in range(3):
        if not end.link.closed:
            end.link.send("a", b"2")
    assert end.link.closed
    assert end.lost == [end.link]
    assert end.link.sock.fileno() == -1
